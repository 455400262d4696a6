"""What the converters of several libraries need: names, activations, blocks with and without context, bases."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastmaf.convert.activations import not_in_place, slope_of
from fastmaf.convert.affine import Affine
from fastmaf.convert.converted import ConditionalBlock
from fastmaf.convert.errors import NotConvertibleError
from fastmaf.convert.network import Network
from fastmaf.kernels import AffineMap
from fastmaf.nn import MADE
from fastmaf.transforms import (
    AffineAutoregressive,
    ElementwiseAffine,
    Inverted,
    MonotonicRQS,
    Permutation,
    SplineMap,
    Transform,
)

LIBRARIES = ("nflows", "zuko", "normflows", "torch")


def kind(module: object) -> str:
    """Returns the class of an object, as messages name it."""
    return f"{type(module).__name__} (of {type(module).__module__})"


def class_name(module: object) -> str:
    """Returns the class of a library or of torch that a module is an instance of, maybe of a user's subclass."""
    classes = [
        one
        for one in type(module).__mro__
        if one.__module__.partition(".")[0] in LIBRARIES and one.__module__ != parametrize.__name__
    ]
    return (classes or [type(module)])[0].__name__


def masked(layer: Any) -> Any:
    """Returns a masked linear layer.

    Raises:
        NotConvertibleError: it is another layer.
    """
    if not any(one.__name__ == "MaskedLinear" for one in type(layer).__mro__) or layer.bias is None:
        raise NotConvertibleError(f"the layer {kind(layer)} cannot be converted; expected a MaskedLinear with a bias")
    return layer


def expected(module: Any, *names: str) -> Any:
    """Returns a module of a class of one of these names.

    Raises:
        NotConvertibleError: it is of another class.
    """
    if class_name(module) not in names:
        raise NotConvertibleError(f"{kind(module)} cannot be converted; expected {' or '.join(names)}")
    return module


def normalised(h: Affine, norm: nn.BatchNorm1d) -> Affine:
    """Returns a batch normalisation with its running statistics."""
    return h.scaled(*scale_and_shift(norm))


def scale_and_shift(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Returns what a batch normalisation with its running statistics multiplies with and adds."""
    expected(norm, "BatchNorm1d")
    if norm.running_mean is None or norm.running_var is None:
        raise NotConvertibleError("a batch normalisation without running statistics depends on the batch")
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach()
    return scale, -norm.running_mean * scale + (norm.bias.detach() if norm.affine else 0)


def residual(network: Network, h: Affine, context: Affine | None, block: Any) -> tuple[Affine, Affine | None]:
    """Returns a residual block of nflows or normflows, and the context in the new layer; dropout is left out."""
    slope, rest = slope_of(block.activation), [] if context is None else [context]
    norms = block.batch_norm_layers if block.use_batch_norm else None
    if norms is None:
        not_in_place(block.activation)
    expected(block.dropout, "Dropout", "Identity")
    value, [h, *rest] = network.activation(slope, h if norms is None else normalised(h, norms[0]), [h, *rest])
    first, second = map(masked, block.linear_layers)
    value = network.linear(value, first.weight, first.bias, first.mask)
    if rest:
        layer = expected(block.context_layer, "Linear")
        value = value + network.linear(rest[0], layer.weight, layer.bias)
    value, [h, *rest] = network.activation(slope, value if norms is None else normalised(value, norms[1]), [h, *rest])
    return h + network.linear(value, second.weight, second.bias, second.mask), rest[0] if rest else None


def outputs_of(network: Network, h: Affine, layer: Any, count: int) -> list[Affine]:
    """Returns the outputs of a last layer with ``count`` rows for each dimension, side by side."""
    h, weight, bias, mask = network.plain(h), masked(layer).weight, layer.bias, layer.mask
    return [network.linear(h, weight[i::count], bias[i::count], mask[i::count]) for i in range(count)]


def affine_block(
    network: Network, shift: Affine, raw: Affine, affine_map: AffineMap, context: nn.Module | None, passed: int
) -> list[Transform | ConditionalBlock]:
    """Returns an affine autoregressive block; see ``block_of``."""
    zero = [0.0, _zero_log_scale(affine_map) if passed else 0.0]
    make = functools.partial(AffineAutoregressive, affine_map=affine_map)
    return block_of(network, [shift, raw], make, zero, context, passed)


def spline_block(
    network: Network, outputs: list[Affine], spline: SplineMap, context: nn.Module | None, passed: int
) -> list[Transform | ConditionalBlock]:
    """Returns a block of splines; see ``block_of``."""
    spline.check()
    if passed and not spline.tails:
        raise NotConvertibleError("a context of splines without tails cannot be converted")
    one = 0.0 if spline.squash else math.log(math.expm1(1 - spline.least))
    zero = [0.0] * (2 * spline.bins) + [one] * (spline.outputs - 2 * spline.bins)
    return block_of(network, outputs, functools.partial(MonotonicRQS, spline=spline), zero, context, passed)


def block_of(
    network: Network,
    outputs: list[Affine],
    make: Callable[[MADE], Transform],
    identity: list[float],
    context: nn.Module | None,
    passed: int,
) -> list[Transform | ConditionalBlock]:
    """Returns an autoregressive block, with the dimensions in the order of its network.

    Args:
        network: with these outputs.
        make: returns the block of a network.
        identity: the outputs with which a dimension passes through the block unchanged.
        context: maps a context to that of the network, or to its first ``passed`` inputs.
    """
    made = network.made(outputs, passed)
    order = network.order(passed)[passed:] - passed
    block = make(made)
    if context is not None:
        with torch.no_grad():
            made.output.bias[: len(outputs) * passed] = torch.tensor(identity).repeat(passed).to(made.output.bias)
        return [ConditionalBlock(block, order, context)]
    if torch.equal(order, torch.arange(len(order))):
        return [block]
    return [Permutation(order), block, Permutation(order.argsort())]


def _zero_log_scale(affine_map: AffineMap) -> float:
    """Returns the raw output whose log-scale is zero."""
    name, rest = affine_map.names[1], 1 - affine_map.epsilon
    if rest <= 0:
        raise NotConvertibleError(f"a context of scales of at least {affine_map.epsilon} cannot be converted")
    if name == "softplus":
        return math.log(math.expm1(rest))
    if name == "sigmoid":
        if not affine_map.epsilon:
            raise NotConvertibleError("a sigmoid without a least scale never reaches 1")
        return math.log(rest / affine_map.epsilon) - affine_map.limit
    return 0.0


def inverted(parts: list[Transform | ConditionalBlock]) -> list[Transform | ConditionalBlock]:
    """Returns the inverse of a sequence of parts.

    Raises:
        NotConvertibleError: a part has a context.
    """
    if any(isinstance(part, ConditionalBlock) for part in parts):
        raise NotConvertibleError("an inverse transform with a context cannot be converted")
    return [part.transform if type(part) is Inverted else _inverse_of(part) for part in reversed(parts)]  # type: ignore[arg-type]


def _inverse_of(part: Transform) -> Transform:
    return Permutation(part.permutation.argsort()) if type(part) is Permutation else Inverted(part)


def base_of(loc: Tensor, scale: Tensor) -> ElementwiseAffine | None:
    """Returns what maps a diagonal normal base to the standard one; None if it is the standard one.

    Raises:
        NotConvertibleError: a scale is not positive.
    """
    loc, scale = loc.detach().flatten(), scale.detach().flatten()
    if not bool((scale > 0).all()):
        raise NotConvertibleError(f"expected positive scales of the base; found {float(scale.min()):g}")
    if bool((loc == 0).all() & (scale == 1).all()):
        return None
    return ElementwiseAffine(-loc / scale, -scale.log())
