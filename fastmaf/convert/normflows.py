"""Conversion of masked affine autoregressive flows of normflows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmaf.convert.activations import slope_of
from fastmaf.convert.affine import Affine
from fastmaf.convert.converted import ConditionalBlock
from fastmaf.convert.errors import NotConvertibleError
from fastmaf.convert.network import Network
from fastmaf.convert.normflows_flow import NormflowsFlow
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
from fastmaf.transforms import (
    AffineAutoregressive,
    ElementwiseAffine,
    Inverted,
    Permutation,
    SplineMap,
    Transform,
)

Parts = list[Transform | ConditionalBlock]


@converter("normflows", ("flows", "q0"))
def from_normflows(flow: nn.Module) -> NormflowsFlow:
    """Converts a ``normflows.NormalizingFlow`` of masked affine autoregressive flows, permutations and activation
    normalisations.

    A ``MaskedAffineAutoregressive`` maps the base to data with one network pass: it is an inverse autoregressive
    flow, unless it is wrapped in ``Reverse``. Both are converted.

    Args:
        flow: the flow; its base is a ``DiagGaussian``.

    Returns:
        A flow of equal density with the methods of ``normflows.NormalizingFlow``.

    Raises:
        NotConvertibleError: a part has no exact counterpart; the message names it.

    Example:
        >>> import normflows
        >>> layers = [normflows.flows.MaskedAffineAutoregressive(3, 16), normflows.flows.Permute(3)]
        >>> source = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(3), layers)
        >>> flow = fastmaf.from_normflows(source)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(flow.log_prob(x), source.log_prob(x), atol=1e-4)
        True
    """
    layers, base = getattr(flow, "flows", None), getattr(flow, "q0", None)
    if layers is None or base is None:
        raise NotConvertibleError(f"{kind(flow)} is no normflows.NormalizingFlow")
    own = next((one.__name__ for one in type(flow).__mro__ if one.__module__.startswith("normflows.")), None)
    if own != "NormalizingFlow":
        raise NotConvertibleError(f"{kind(flow)} cannot be converted; expected a normflows.NormalizingFlow")
    if class_name(base) != "DiagGaussian" or base.n_dim != 1 or base.temperature is not None:
        raise NotConvertibleError(f"the base {kind(base)} cannot be converted; supported is a DiagGaussian of vectors")
    # From data to the base, the last layer first.
    parts = [part for layer in reversed(layers) for part in _checked_parts(layer, base.loc.detach()[0])]
    return NormflowsFlow(int(base.shape[0]), parts, base_of(base.loc, base.log_scale.exp()), flow)


def _checked_parts(layer: Any, like: Tensor) -> Parts:
    parts = _inverse_parts(layer)
    inverse = any(isinstance(part, Inverted) for part in parts)  # its one pass is the other way round
    probe(layer, parts, (lambda z, _: layer(z)) if inverse else (lambda x, _: layer.inverse(x)), like, 0, inverse)
    return parts


def _inverse_parts(layer: Any) -> Parts:
    """Returns a layer's inverse, from data towards the base."""
    name = class_name(layer)
    if name == "MaskedAffineAutoregressive":
        return [Inverted(part) if isinstance(part, AffineAutoregressive) else part for part in _block(layer)]
    if name == "Reverse":
        return inverted(_inverse_parts(layer.flow))
    if name == "AutoregressiveRationalQuadraticSpline":  # turned round by its authors
        return _block(layer.mprqat)
    if name == "Permute":
        count = layer.num_channels
        if layer.mode == "shuffle":
            if not torch.equal(layer.perm[layer.inv_perm], torch.arange(count, device=layer.perm.device)):
                raise NotConvertibleError("the permutations of a Permute are not each other's inverse")
            return [Permutation(layer.inv_perm)]
        return [Permutation(torch.arange(count).roll(-((count + 1) // 2)))]
    if name in ("ActNorm", "AffineConstFlow") and layer.s.dim() == 2:
        if name == "ActNorm" and not bool(layer.data_dep_init_done):
            raise NotConvertibleError("an ActNorm that has seen no batch yet has no scale")
        s, t = layer.s.detach()[0], layer.t.detach()[0]
        return [ElementwiseAffine(-t * (-s).exp(), -s)]
    raise NotConvertibleError(f"the flow {kind(layer)} cannot be converted exactly")


def _block(layer: Any) -> Parts:
    made = layer.autoregressive_net
    if class_name(made) != "MADE" or type(made.preprocessing) is not nn.Identity:
        raise NotConvertibleError(f"the network {kind(made)} with {kind(made.preprocessing)} cannot be converted")
    if hasattr(made, "context_layer"):
        raise NotConvertibleError("a context of normflows multiplies within the blocks, which no ReLU does")
    first = masked(made.initial_layer)
    features = first.in_features
    degrees = first.mask.new_tensor(range(1, features + 1)).long()
    if bool((made.final_layer.mask[::2].sum(1).diff() < 0).any()):
        raise NotConvertibleError("a MADE with permuted masks cannot be converted")
    network, h = made_network(made, degrees, nn.Identity()) if is_smooth(made) else _piecewise_linear(made, degrees)
    if class_name(layer) == "MaskedPiecewiseRationalQuadraticAutoregressive":
        spline = _spline(layer)
        return spline_block(network, outputs_of(network, h, made.final_layer, spline.outputs), spline, None, 0)
    raw, shift = outputs_of(network, h, made.final_layer, 2)
    affine_map = AffineMap.of("scale_first", "sigmoid", limit=2.0, epsilon=1e-3)
    return affine_block(network, shift, raw, affine_map, None, 0)


def _piecewise_linear(made: Any, degrees: Tensor) -> tuple[Network, Affine]:
    """Returns the network, and its last hidden layer."""
    first = masked(made.initial_layer)
    network = Network(degrees, first.weight)
    h = network.linear(network.last(), first.weight, first.bias, first.mask)
    for block in made.blocks:
        if class_name(block) == "MaskedResidualBlock":
            h, _ = residual(network, h, None, block)
        else:
            expected(block, "MaskedFeedforwardBlock")
            expected(block.dropout, "Dropout", "Identity")
            h = normalised(h, block.batch_norm) if block.batch_norm else h
            linear = masked(block.linear)
            h = network.linear(network.plain(h), linear.weight, linear.bias, linear.mask)
            h, _ = network.activation(slope_of(block.activation), h)
    return network, h


def _spline(layer: Any) -> SplineMap:
    if hasattr(layer.autoregressive_net, "hidden_features"):
        raise NotConvertibleError("a spline that divides by a number of hidden features cannot be converted")
    if layer.tails != "linear" or isinstance(layer.tail_bound, Tensor):
        raise NotConvertibleError(f"a spline with tails {layer.tails!r} of several bounds cannot be converted")
    if not layer.min_bin_width == layer.min_bin_height == layer.min_derivative:
        raise NotConvertibleError("a spline whose smallest bins and smallest derivatives differ cannot be converted")
    bound = float(layer.tail_bound)
    return SplineMap(layer.num_bins, -bound, bound, True, layer.min_derivative, squash=False)
