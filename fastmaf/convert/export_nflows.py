"""Conversion of flows to nflows 0.14."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmaf.convert.converted import ConditionalBlock, ConvertedFlow
from fastmaf.convert.errors import NotConvertibleError
from fastmaf.convert.export import DenseLayer, activation_of, finished, layers_of, module_of, parts_of
from fastmaf.convert.parts import kind
from fastmaf.flows import Flow
from fastmaf.transforms import (
    AffineAutoregressive,
    ElementwiseAffine,
    Inverted,
    MonotonicRQS,
    Permutation,
    SplineMap,
)


def to_nflows(flow: Flow | ConvertedFlow) -> nn.Module:
    """Converts a flow to an ``nflows.flows.Flow`` of equal density, z and samples.

    nflows can express affine blocks of its own map, z = (softplus(u) + epsilon) x + t
    (``AffineMap.of("scale_first", "softplus", epsilon=...)``), splines of its parameters (``SplineMap`` with ``squash``
    False), ``Permutation``, ``ElementwiseAffine`` (as an ``ActNorm``) and ``Inverted`` ones of these. Networks become
    feed-forward ones with fastmaf's masks, also those that had residual blocks. Weights are dense again, and samples
    take one pass of the network per dimension.

    Args:
        flow: a flow, or a converted one.

    Raises:
        ImportError: nflows is not installed.
        NotConvertibleError: nflows has no exact counterpart of a part; the message names it.

    Example:
        >>> from nflows.flows import MaskedAutoregressiveFlow
        >>> source = MaskedAutoregressiveFlow(3, 16, num_layers=2, num_blocks_per_layer=2)
        >>> again = fastmaf.to_nflows(fastmaf.accelerate(source))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(again.log_prob(x), source.log_prob(x), atol=1e-4)
        True
    """
    parts = [_part(part) for part in parts_of(flow)]
    transform = module_of("nflows", "transforms").CompositeTransform(parts)
    base = module_of("nflows", "distributions").StandardNormal([flow.features])
    return finished(module_of("nflows", "flows").Flow(transform, base), flow)


def _part(part: Any) -> nn.Module:
    transforms = module_of("nflows", "transforms")
    if type(part) is AffineAutoregressive:
        affine_map = part._map
        if affine_map.names != ("scale_first", "softplus"):
            raise NotConvertibleError(
                f"nflows has no counterpart of the affine map {affine_map.names}: its own is z = scale x + shift with "
                "scale = softplus(u) + epsilon, AffineMap.of('scale_first', 'softplus', epsilon=1e-3)"
            )
        block = transforms.MaskedAffineAutoregressiveTransform(part.features, 1, **_network_options(part))
        block._epsilon = affine_map.epsilon
        _fill(block.autoregressive_net, part, torch.tensor([1, 0]))  # nflows has the raw scale first
        return block  # type: ignore[no-any-return]
    if type(part) is MonotonicRQS:
        options = {**_network_options(part), **_spline_options(part.spline)}
        block = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(part.features, 1, **options)
        _fill(block.autoregressive_net, part, torch.arange(part.spline.outputs))
        return block  # type: ignore[no-any-return]
    if type(part) is Permutation:
        return transforms.Permutation(part.permutation.clone())  # type: ignore[no-any-return]
    if type(part) is ElementwiseAffine:
        return _act_norm(part.shift, part.log_scale)
    if type(part) is Inverted:
        return transforms.InverseTransform(_part(part.transform))  # type: ignore[no-any-return]
    if isinstance(part, ConditionalBlock):
        raise NotConvertibleError("nflows reads a context otherwise than a converted block does; see to_zuko")
    raise NotConvertibleError(f"nflows has no counterpart of the transform {kind(part)}")


def _network_options(part: AffineAutoregressive | MonotonicRQS) -> dict[str, Any]:
    made = part.made
    return {
        "num_blocks": len(made.hidden_features) - 1,
        "use_residual_blocks": False,
        "activation": activation_of(made).function,
    }


def _spline_options(spline: SplineMap) -> dict[str, Any]:
    symmetric, unit = spline.low == -spline.high, (spline.low, spline.high) == (0.0, 1.0)
    if spline.squash or not (symmetric if spline.tails else unit):
        raise NotConvertibleError(
            "nflows has no counterpart of this spline: expected squash=False, and an interval [-B, B] with tails or "
            f"[0, 1] without; found {spline}"
        )
    least = dict.fromkeys(("min_bin_width", "min_bin_height", "min_derivative"), spline.least)
    tails = {"tails": "linear", "tail_bound": spline.high} if spline.tails else {"tails": None}
    return {"num_bins": spline.bins, **tails, **least}


def _fill(net: Any, part: AffineAutoregressive | MonotonicRQS, outputs: Tensor) -> None:
    """Puts the layers of a block into a network of nflows.

    Args:
        outputs: those of a dimension in the order of nflows.
    """
    *hidden, last = layers_of(part.made)
    rows = (torch.arange(part.features)[:, None] * len(outputs) + outputs).flatten()
    degrees = part.made.degrees
    net.initial_layer = _masked(hidden[0], degrees[0], part.features)
    for block, layer, own in zip(net.blocks, hidden[1:], degrees[1:], strict=True):
        block.linear = _masked(layer, own, part.features)
        block.degrees = block.linear.degrees
    dimensions = torch.arange(1, part.features + 1).repeat_interleave(len(outputs))
    net.final_layer = _masked(last.taken(rows=rows), dimensions, part.features)


def _masked(layer: DenseLayer, degrees: Tensor, features: int) -> nn.Module:
    units, inputs = layer.weight.shape
    made = module_of("nflows", "transforms.made")
    linear = made.MaskedLinear(torch.ones(inputs, dtype=torch.int64), units, features, False, is_output=False)
    linear.to(layer.weight)
    layer.copy_to(linear)
    linear.degrees = degrees.to(layer.weight.device, torch.int64)
    return linear  # type: ignore[no-any-return]


def _act_norm(shift: Tensor, log_scale: Tensor) -> nn.Module:
    norm = module_of("nflows", "transforms").ActNorm(len(shift)).to(shift)
    with torch.no_grad():
        norm.shift.copy_(shift)
        norm.log_scale.copy_(log_scale)
        norm.initialized.fill_(True)
    return norm  # type: ignore[no-any-return]
