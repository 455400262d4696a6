"""What the converters of several libraries need: names, activations, blocks with and without context, bases."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastmaf.convert.converted import ConditionalBlock
from fastmaf.convert.network import Affine, Network, NotConvertibleError
from fastmaf.kernels import AffineMap
from fastmaf.transforms import AffineAutoregressive, ElementwiseAffine, Permutation, Transform

SUPPORTED = "relu, leaky_relu and the identity"


def kind(module: object) -> str:
    """Returns the class of an object, as messages name it."""
    return f"{type(module).__name__} (of {type(module).__module__})"


def slope_of(activation: Any) -> float:
    """Returns the slope of an activation below zero, given as a function or a module.

    Raises:
        NotConvertibleError: it is not piecewise linear with a bend at zero.
    """
    if isinstance(activation, functools.partial):
        if activation.func is torch.nn.functional.leaky_relu and not activation.args:
            return float(activation.keywords.get("negative_slope", 0.01))
    elif activation in (torch.relu, torch.nn.functional.relu) or isinstance(activation, nn.ReLU):
        return 0.0
    elif activation is torch.nn.functional.leaky_relu:
        return 0.01
    elif isinstance(activation, nn.LeakyReLU):
        return float(activation.negative_slope)
    elif isinstance(activation, nn.Identity):
        return 1.0
    name = getattr(activation, "__name__", None) or type(activation).__name__
    raise NotConvertibleError(f"the activation {name} cannot be converted exactly; supported are {SUPPORTED}")


def normalised(h: Affine, norm: nn.BatchNorm1d) -> Affine:
    """Returns a batch normalisation with its running statistics."""
    if norm.running_mean is None or norm.running_var is None:
        raise NotConvertibleError("a batch normalisation without running statistics depends on the batch")
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale + (norm.bias.detach() if norm.affine else 0)
    return h.scaled(scale, shift)


def block_of(
    network: Network, shift: Affine, raw: Affine, affine_map: AffineMap, context: nn.Module | None, passed: int
) -> list[Transform | ConditionalBlock]:
    """Returns an autoregressive block, in the order of its network.

    Args:
        network: with the outputs ``shift`` and ``raw``.
        affine_map: of the block.
        context: maps a context to the network's first ``passed`` inputs.
    """
    made = network.made(shift, raw, passed)
    order = network.order(passed)[passed:] - passed
    block = AffineAutoregressive(made, affine_map=affine_map)
    if context is not None:
        with torch.no_grad():
            made.output.bias[1 : 2 * passed : 2] = _zero_log_scale(affine_map)
        return [ConditionalBlock(block, order, context)]
    if torch.equal(order, torch.arange(len(order))):
        return [block]
    return [Permutation(order), block, Permutation(order.argsort())]


def _zero_log_scale(affine_map: AffineMap) -> float:
    """Returns the raw output whose log-scale is zero."""
    name, rest = affine_map.names[1], 1 - affine_map.epsilon
    if name == "softplus":
        return math.log(math.expm1(rest))
    if name == "sigmoid":
        if not affine_map.epsilon:
            raise NotConvertibleError("a sigmoid without a least scale never reaches 1")
        return math.log(rest / affine_map.epsilon) - affine_map.limit
    return 0.0


def base_of(loc: Tensor, scale: Tensor) -> list[Transform]:
    """Returns what maps a diagonal normal base to the standard one."""
    loc, scale = loc.detach().flatten(), scale.detach().flatten()
    if bool((loc == 0).all() & (scale == 1).all()):
        return []
    return [ElementwiseAffine(-loc / scale, -scale.log())]
