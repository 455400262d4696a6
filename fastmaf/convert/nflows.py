"""Conversion of masked affine autoregressive flows of nflows 0.14."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastmaf.convert.converted import ConditionalBlock, ConvertedFlow
from fastmaf.convert.network import Affine, Network, NotConvertibleError
from fastmaf.convert.parts import (
    affine_block,
    base_of,
    expected,
    kind,
    masked,
    normalised,
    outputs_of,
    residual,
    slope_of,
    spline_block,
)
from fastmaf.convert.smooth import is_smooth, made_network
from fastmaf.convert.source import converter
from fastmaf.kernels import AffineMap
from fastmaf.transforms import ElementwiseAffine, Permutation, SplineMap, Transform

Parts = list[Transform | ConditionalBlock]
_SPLINE = "MaskedPiecewiseRationalQuadraticAutoregressiveTransform"


class NflowsFlow(ConvertedFlow):
    """A converted flow with the methods of ``nflows.flows.Flow``, and the same numbers for a seed.

    Made by ``from_nflows``; see there for an example.
    """

    def __init__(self, features: int, parts: Parts, source: Any) -> None:
        super().__init__(features, parts, source)
        self.embedding_net = copy.deepcopy(source._embedding_net)

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the log-density ``[N]`` of ``inputs`` ``[N, D]`` given ``context`` ``[N, C]``."""
        inputs = torch.as_tensor(inputs)
        if context is not None and len(inputs) != len(context):
            raise ValueError(f"expected a context for each of {len(inputs)} inputs; found {len(context)}")
        return self.log_density(inputs, self._embedded(context))

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the noise ``[N, D]`` of ``inputs``."""
        return self.to_base(inputs, self._embedded(context))[0]

    @torch.no_grad()
    def sample(self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """Draws ``[num_samples, D]``, or ``[C, num_samples, D]`` with a context of C rows."""
        if batch_size is None:
            return self._sample(num_samples, context)[0]
        sizes = [min(batch_size, num_samples - start) for start in range(0, num_samples, batch_size)]
        return torch.cat([self._sample(size, context)[0] for size in sizes], 0)

    @torch.no_grad()
    def sample_and_log_prob(self, num_samples: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws samples as ``sample``, and returns their log-densities beside them."""
        return self._sample(num_samples, context)

    def _embedded(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else self.embedding_net(torch.as_tensor(context))  # type: ignore[no-any-return]

    def _sample(self, num_samples: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if num_samples < 1:
            raise TypeError(f"num_samples must be a positive integer; found {num_samples}")
        rows = 1 if context is None else len(context)
        like = self._like()
        z = torch.randn(rows * num_samples, self.features, dtype=like.dtype, device=like.device)
        embedded = self._embedded(context)
        if embedded is not None:
            embedded = embedded.repeat_interleave(num_samples, 0)
        x, ladj = self.from_base(z, embedded)
        normal = torch.distributions.Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(1)
        log_prob = normal - ladj
        if context is None:
            return x, log_prob
        return x.unflatten(0, (rows, num_samples)), log_prob.unflatten(0, (rows, num_samples))

    def _source_log_prob(self, source: Any, x: Tensor, context: Tensor | None) -> Tensor:
        return source.log_prob(x, context)  # type: ignore[no-any-return]

    def _source_to_base(self, source: Any, x: Tensor, context: Tensor | None) -> Tensor:
        return source.transform_to_noise(x, context)  # type: ignore[no-any-return]

    def _source_from_base(self, source: Any, z: Tensor, context: Tensor | None) -> Tensor:
        return source._transform.inverse(z, source._embedding_net(context))[0]  # type: ignore[no-any-return]


@converter("nflows", ("_transform", "_distribution"))
def from_nflows(flow: nn.Module) -> NflowsFlow:
    """Converts a flow of nflows whose transforms are masked affine autoregressive ones, permutations, batch and
    activation normalisations and fixed affine maps.

    Degrees, masks, orders, the scale map ``softplus(u) + epsilon`` and contexts are the source's. Residual blocks
    become hidden layers of more units. Dropout is left out, and batch normalisations have their running statistics, as
    in evaluation.

    Args:
        flow: an ``nflows.flows.Flow``, such as a ``MaskedAutoregressiveFlow``.

    Returns:
        A flow of equal density with the methods of ``nflows.flows.Flow``.

    Raises:
        NotConvertibleError: a part has no exact counterpart; the message names it.

    Example:
        >>> from nflows.flows import MaskedAutoregressiveFlow
        >>> source = MaskedAutoregressiveFlow(3, 16, num_layers=2, num_blocks_per_layer=2)
        >>> flow = fastmaf.from_nflows(source)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(flow.log_prob(x), source.log_prob(x), atol=1e-4)
        True
    """
    transform, base = getattr(flow, "_transform", None), getattr(flow, "_distribution", None)
    if transform is None or base is None:
        raise NotConvertibleError(f"{kind(flow)} is no nflows.flows.Flow")
    parts = _parts(transform)
    name = type(base).__name__
    if name == "StandardNormal":
        [features] = base._shape
        return NflowsFlow(int(features), parts, flow)
    if name == "DiagonalNormal":
        [features] = base._shape
        return NflowsFlow(int(features), [*parts, *base_of(base.mean_, base.log_std_.exp())], flow)
    raise NotConvertibleError(f"the base {kind(base)} cannot be converted; supported are normal distributions")


def _parts(transform: Any) -> Parts:
    name = type(transform).__name__
    if name == "CompositeTransform":
        return [part for one in transform._transforms for part in _parts(one)]
    if name in ("MaskedAffineAutoregressiveTransform", _SPLINE):
        return _block(transform)
    if name in ("Permutation", "RandomPermutation", "ReversePermutation") and transform._dim == 1:
        return [Permutation(transform._permutation)]
    if name == "IdentityTransform":
        return []
    if name == "BatchNorm":
        weight = transform.weight.detach()
        scale = weight * (transform.running_var + transform.eps).rsqrt()
        return [ElementwiseAffine(transform.bias - transform.running_mean * scale, scale.log())]
    if name == "ActNorm":
        if not bool(transform.initialized):
            raise NotConvertibleError("an ActNorm that has seen no batch yet has no scale")
        return [ElementwiseAffine(transform.shift, transform.log_scale)]
    raise NotConvertibleError(f"the transform {kind(transform)} cannot be converted exactly")


class _Context(nn.Module):
    """The inputs that stand for a context: what the first layer adds, and the context itself."""

    def __init__(self, layer: nn.Module, activation: Any, itself: bool) -> None:
        super().__init__()
        self.layer, self.activation, self.itself = layer, activation, itself

    def forward(self, context: Tensor) -> Tensor:
        added = self.activation(self.layer(context))
        return torch.cat([added, context], 1) if self.itself else added


def _block(transform: Any) -> Parts:
    made = transform.autoregressive_net
    if type(made).__name__ != "MADE":
        raise NotConvertibleError(f"the network {kind(made)} cannot be converted; expected nflows' MADE")
    first = masked(made.initial_layer)
    features = first.in_features
    layer = getattr(made, "context_layer", None)
    if layer is not None:
        expected(layer, "Linear")
    added = first.out_features if layer is not None else 0
    itself = layer.in_features if layer is not None and made.use_residual_blocks and len(made.blocks) else 0
    if is_smooth(made):
        after_first = nn.Identity() if made.use_residual_blocks else made.activation
        contexts, passed = None if layer is None else (added, itself), 0
        network, h = made_network(made, torch.arange(1, features + 1), after_first, contexts)
    else:
        passed = added + itself
        network, h = _piecewise_linear(made, added, itself)
    of_context = None if layer is None else _Context(copy.deepcopy(layer), made.activation, bool(itself))
    outputs = outputs_of(network, h, made.final_layer, made.final_layer.out_features // features)
    if type(transform).__name__ == _SPLINE:
        return spline_block(network, outputs, _spline(transform), of_context, passed)
    raw, shift = outputs
    affine_map = AffineMap.of("scale_first", "softplus", epsilon=float(transform._epsilon))
    return affine_block(network, shift, raw, affine_map, of_context, passed)


def _piecewise_linear(made: Any, added: int, itself: int) -> tuple[Network, Affine]:
    """Returns a network whose first inputs are the context, and its last hidden layer."""
    first, slope, passed = masked(made.initial_layer), slope_of(made.activation), added + itself
    features = first.in_features
    inputs = torch.cat([torch.zeros(passed, dtype=torch.int64), torch.arange(1, features + 1)])
    network = Network(inputs, first.weight)
    h = network.linear(network.units(passed, features), first.weight, first.bias, first.mask)
    if added:
        h = h + network.units(0, added)
    context = network.units(added, itself) if itself else None
    if not made.use_residual_blocks:
        h, _ = network.activation(slope, h)
    for block in made.blocks:
        if made.use_residual_blocks:
            h, context = residual(network, h, context, expected(block, "MaskedResidualBlock"))
        else:
            expected(block, "MaskedFeedforwardBlock")
            expected(block.dropout, "Dropout", "Identity")
            h = normalised(h, block.batch_norm) if block.batch_norm else h
            linear = masked(block.linear)
            h = network.linear(network.plain(h), linear.weight, linear.bias, linear.mask)
            h, _ = network.activation(slope_of(block.activation), h)
    return network, h


def _spline(transform: Any) -> SplineMap:
    if hasattr(transform.autoregressive_net, "hidden_features"):
        raise NotConvertibleError("a spline that divides by a number of hidden features cannot be converted")
    if transform.tails not in ("linear", None):
        raise NotConvertibleError(f"a spline with tails {transform.tails!r} cannot be converted")
    if not transform.min_bin_width == transform.min_bin_height == transform.min_derivative:
        raise NotConvertibleError("a spline whose smallest bins and smallest derivatives differ cannot be converted")
    tails = transform.tails == "linear"
    low, high = (-transform.tail_bound, transform.tail_bound) if tails else (0.0, 1.0)
    return SplineMap(transform.num_bins, float(low), float(high), tails, transform.min_derivative, squash=False)
