"""Registers ``fastmaf::level_inverse`` and its backward with torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.backends import implementation
from fastmaf.kernels.block import CHAIN_SCHEMA, Block, chain
from fastmaf.kernels.masked_linear.op import check_activation
from fastmaf.kernels.padding import keep_zero

_LAYERS = (
    "Tensor[] weights, Tensor[] biases, Tensor[] prefixes, Tensor[] tiles, Tensor schedule,"
    " str activation, float bound, bool soft"
)


@torch.library.custom_op("fastmaf::level_inverse", mutates_args=(), schema=f"(Tensor z, {_LAYERS}) -> (Tensor, Tensor)")
def _forward(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    prefixes: Sequence[Tensor],
    tiles: Sequence[Tensor],
    schedule: Tensor,
    activation: str,
    bound: float,
    soft: bool,
) -> tuple[Tensor, Tensor]:
    keep_zero(weights, prefixes, tiles)
    backend = implementation("level_inverse", z)
    result: tuple[Tensor, Tensor] = backend.forward(
        z, weights, biases, prefixes, tiles, schedule, activation, bound, soft
    )
    return result


@_forward.register_fake
def _(z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[0])


@torch.library.custom_op(
    "fastmaf::level_inverse_backward",
    mutates_args=(),
    schema=f"(Tensor grad_x, Tensor grad_ladj, Tensor z, {_LAYERS}) -> Tensor[]",
)
def _backward(
    grad_x: Tensor,
    grad_ladj: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    prefixes: Sequence[Tensor],
    tiles: Sequence[Tensor],
    schedule: Tensor,
    activation: str,
    bound: float,
    soft: bool,
) -> list[Tensor]:
    backend = implementation("level_inverse", z)
    grads: list[Tensor] = backend.backward(
        grad_x, grad_ladj, z, weights, biases, prefixes, tiles, schedule, activation, bound, soft
    )
    return grads


@_backward.register_fake
def _(
    grad_x: Tensor, grad_ladj: Tensor, z: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *_: Any
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (z, *weights, *biases)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, weights, biases, prefixes, tiles, schedule, *ctx.rest = inputs
    ctx.layers = len(weights)
    ctx.save_for_backward(z, schedule, *weights, *biases, *prefixes, *tiles)


@outside_autocast
def _autograd(ctx: Any, grad_x: Tensor, grad_ladj: Tensor) -> tuple[Any, ...]:
    z, schedule, *tensors = ctx.saved_tensors
    k, options = ctx.layers, ctx.rest
    layers = [tensors[i * k : (i + 1) * k] for i in range(4)]
    if composite.needed_for((grad_x, grad_ladj)):

        def inverse(z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
            weights, biases, (_, _, prefixes, tiles) = parameters[:k], parameters[k:], layers
            return composite.level_inverse(z, weights, biases, prefixes, tiles, schedule, *options)

        first, *rest = composite.gradients(inverse, (z, *layers[0], *layers[1]), (grad_x, grad_ladj))
        return first, rest[:k], rest[k:], [None] * k, [None] * k, None, None, None, None
    grad_z, *grads = _backward(grad_x, grad_ladj, z, *layers, schedule, *options)
    return grad_z, grads[:k], grads[k:], [None] * k, [None] * k, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op(
    "fastmaf::chain_inverse",
    mutates_args=(),
    schema=f"(Tensor z, {CHAIN_SCHEMA}) -> (Tensor, Tensor)",
)
def _chain(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    prefixes: Sequence[Tensor],
    tiles: Sequence[Tensor],
    schedules: Sequence[Tensor],
    permutations: Sequence[Tensor],
    activation: str,
    bounds: Sequence[float],
    softs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    keep_zero(weights, prefixes, tiles)
    result: tuple[Tensor, Tensor] = implementation("level_inverse", z).chain(
        z, weights, biases, prefixes, tiles, schedules, permutations, activation, bounds, softs
    )
    return result


@_chain.register_fake
def _(z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[0])


def chain_inverse(z: Tensor, blocks: Sequence[Block], permutations: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Inverts several blocks in turn, in one call that autograd does not see through.

    Args:
        z: ``[N, D]``.
        blocks: in the order of inversion, all of one activation.
        permutations: int64 ``[D]``, one per block, applied before it as ``z[:, permutation]``, and one for after the
            last; None where there is none.

    Returns:
        ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz| in nats.

    Raises:
        ValueError: there is no block, an activation is unknown, they differ, or permutations are not one more.
    """
    of = chain(blocks, permutations)
    if composite.needed():
        return composite.chain_inverse(z, of)
    result: tuple[Tensor, Tensor] = _chain(z.contiguous(), *of)
    return result


def level_inverse(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    prefixes: Sequence[Tensor],
    tiles: Sequence[Tensor],
    schedule: Tensor,
    activation: str,
    bound: float,
    soft: bool,
) -> tuple[Tensor, Tensor]:
    """Inverts an affine autoregressive block exactly, ``x = z exp(log_scale(x)) + shift(x)``, one step per level.

    Args:
        z: ``[N, D]``.
        weights: the packed weights, hidden layers first, the output layer last.
        biases: their biases; the output layer's rows are interleaved (shift, raw log-scale).
        prefixes: their prefixes, int64.
        tiles: ``PackedLayout.table`` of each layer.
        schedule: ``level_schedule`` of the block, int32, on the CPU.
        activation: of the hidden layers, ``"relu"`` or ``"identity"``.
        bound: log-scales stay within ``±bound``; ``inf`` leaves them free.
        soft: bound by tanh instead of by a clamp.

    Returns:
        ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz| in nats.
    """
    check_activation(activation)
    if composite.needed():
        return composite.level_inverse(z, weights, biases, prefixes, tiles, schedule, activation, bound, soft)
    result: tuple[Tensor, Tensor] = _forward(
        z.contiguous(),
        [weight.contiguous() for weight in weights],
        [bias.contiguous() for bias in biases],
        list(prefixes),
        list(tiles),
        schedule,
        activation,
        bound,
        soft,
    )
    return result
