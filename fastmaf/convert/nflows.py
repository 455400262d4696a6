"""Conversion of masked affine autoregressive flows of nflows 0.14."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmaf.convert.activations import slope_of
from fastmaf.convert.affine import Affine
from fastmaf.convert.converted import ConditionalBlock, ConvertedFlow
from fastmaf.convert.errors import NotConvertibleError
from fastmaf.convert.evaluation import copied
from fastmaf.convert.network import Network
from fastmaf.convert.parts import (
    affine_block,
    base_of,
    class_name,
    expected,
    inverted,
    kind,
    masked,
    normalised,
    outputs_of,
    residual,
    spline_block,
)
from fastmaf.convert.probe import probe
from fastmaf.convert.smooth import is_smooth, made_network
from fastmaf.convert.source import converter
from fastmaf.kernels import AffineMap
from fastmaf.nn import MADE
from fastmaf.transforms import ElementwiseAffine, Permutation, SplineMap, Transform

Parts = list[Transform | ConditionalBlock]
_SPLINE = "MaskedPiecewiseRationalQuadraticAutoregressiveTransform"


class NflowsFlow(ConvertedFlow):
    """A converted flow with the methods of ``nflows.flows.Flow``, and the same numbers for a seed.

    Made by ``from_nflows``; see there for an example.
    """

    def __init__(self, features: int, parts: Parts, base: ElementwiseAffine | None, source: Any) -> None:
        super().__init__(features, parts, base, source)
        self._ignores_context = not any(isinstance(module, MADE) for module in self.modules())  # as nflows does
        self.embedding_net = copied(source._embedding_net)

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the log-density ``[N]`` of ``inputs`` ``[N, D]`` given ``context`` ``[N, C]``."""
        inputs = torch.as_tensor(inputs)
        if context is not None and len(inputs) != len(context):
            raise ValueError(f"expected a context for each of {len(inputs)} inputs; found {len(context)}")
        return self.log_density(inputs, self._embedded(context))

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the noise ``[N, D]`` of ``inputs``."""
        return self.to_latent(inputs, self._embedded(context))[0]

    def sample(self, num_samples: int, context: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """Draws ``[num_samples, D]``, or ``[C, num_samples, D]`` with a context of C rows; differentiable."""
        if batch_size is None:
            return self.sample_and_log_prob(num_samples, context)[0]
        _check_count("batch_size", batch_size)
        _check_count("num_samples", num_samples)
        sizes = [min(batch_size, num_samples - start) for start in range(0, num_samples, batch_size)]
        return torch.cat([self.sample_and_log_prob(size, context)[0] for size in sizes], 0)

    def sample_and_log_prob(self, num_samples: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws samples as ``sample``, and returns their log-densities beside them."""
        _check_count("num_samples", num_samples)
        if context is None:
            return self.draw(num_samples)
        embedded = self._embedded(context)
        assert embedded is not None
        x, log_prob = self.draw(len(embedded) * num_samples, embedded.repeat_interleave(num_samples, 0))
        shape = (len(embedded), num_samples)
        return x.unflatten(0, shape), log_prob.unflatten(0, shape)

    def _embedded(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else self.embedding_net(torch.as_tensor(context))  # type: ignore[no-any-return]

    def _source_log_prob(self, source: Any, x: Tensor, context: Tensor | None) -> Tensor:
        return source.log_prob(x, context)  # type: ignore[no-any-return]

    def _source_to_latent(self, source: Any, x: Tensor, context: Tensor | None) -> Tensor:
        return source.transform_to_noise(x, context)  # type: ignore[no-any-return]

    def _source_from_latent(self, source: Any, z: Tensor, context: Tensor | None) -> Tensor:
        return source._transform.inverse(z, source._embedding_net(context))[0]  # type: ignore[no-any-return]


def _check_count(name: str, count: Any) -> None:
    if not isinstance(count, int) or count < 1:
        raise TypeError(f"{name} must be a positive integer; found {count!r}")


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
    name = class_name(base)
    if name not in ("StandardNormal", "DiagonalNormal") or len(base._shape) != 1:
        raise NotConvertibleError(f"the base {kind(base)} cannot be converted; supported are normal vectors")
    like = next((one for one in flow.parameters() if one.is_floating_point()), torch.empty(0)).detach()
    parts = _parts(transform, like.new_zeros(base._shape))
    own = base_of(base.mean_, base.log_std_.exp()) if name == "DiagonalNormal" else None
    return NflowsFlow(base._shape[0], parts, own, flow)


def _parts(transform: Any, like: Tensor) -> Parts:
    """Returns the parts of a transform of vectors ``like`` this one."""
    if class_name(transform) == "CompositeTransform":
        return [part for one in transform._transforms for part in _parts(one, like)]
    if class_name(transform) == "InverseTransform":
        return inverted(_parts(transform._transform, like))
    parts = _leaf(transform, like)
    layer = getattr(getattr(transform, "autoregressive_net", None), "context_layer", None)
    probe(transform, parts, transform, like, 0 if layer is None else layer.in_features, inverse=False)
    return parts


def _leaf(transform: Any, like: Tensor) -> Parts:
    name = class_name(transform)
    if name in ("MaskedAffineAutoregressiveTransform", _SPLINE):
        return _block(transform)
    if name in ("Permutation", "RandomPermutation", "ReversePermutation") and transform._dim == 1:
        return [Permutation(transform._permutation)]
    if name == "IdentityTransform":
        return []
    if name in ("PointwiseAffineTransform", "AffineTransform"):
        shift, log_scale = (value.to(like).expand_as(like) for value in (transform._shift, transform._log_scale))
        return [ElementwiseAffine(shift, log_scale).requires_grad_(False)]
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

    def __init__(self, layer: nn.Linear, activation: Any, itself: bool) -> None:
        super().__init__()
        self.layer = nn.utils.skip_init(
            nn.Linear, layer.in_features, layer.out_features, dtype=layer.weight.dtype, device=layer.weight.device
        )
        self.layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        self.activation, self.itself = activation, itself

    def forward(self, context: Tensor) -> Tensor:
        added = self.activation(self.layer(context))
        return torch.cat([added, context], 1) if self.itself else added


def _block(transform: Any) -> Parts:
    made = transform.autoregressive_net
    if class_name(made) != "MADE":
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
    of_context = None if layer is None else _Context(layer, made.activation, bool(itself))
    outputs = outputs_of(network, h, made.final_layer, made.final_layer.out_features // features)
    if class_name(transform) == _SPLINE:
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
