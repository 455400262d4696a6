"""Registers ``fastmaf::affine_output`` and its backward with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.backends import implementation
from fastmaf.kernels.factors import Factors, sink_of
from fastmaf.kernels.padding import keep_zero


@torch.library.custom_op(
    "fastmaf::affine_output",
    mutates_args=(),
    schema=(
        "(Tensor h, Tensor weight, Tensor bias, Tensor x, Tensor prefix, Tensor tiles, float bound, bool soft)"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
def _forward(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, prefix: Tensor, tiles: Tensor, bound: float, soft: bool
) -> tuple[Tensor, Tensor, Tensor]:
    keep_zero([weight], [prefix], [tiles])
    backend = implementation("affine_output", x)
    result: tuple[Tensor, Tensor, Tensor] = backend.forward(h, weight, bias, x, prefix, tiles, bound, soft)
    return result


@_forward.register_fake
def _(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, prefix: Tensor, tiles: Tensor, bound: float, soft: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0]), x.new_empty(x.shape)


@torch.library.custom_op(
    "fastmaf::affine_output_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_z, Tensor grad_ladj, Tensor grad_log_scale, Tensor h, Tensor weight, Tensor z, Tensor "
        "log_scale, Tensor prefix,"
        " Tensor tiles, float bound, bool soft) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _backward(
    grad_z: Tensor,
    grad_ladj: Tensor,
    grad_log_scale: Tensor,
    h: Tensor,
    weight: Tensor,
    z: Tensor,
    log_scale: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    bound: float,
    soft: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend = implementation("affine_output", z)
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = backend.backward(
        grad_z, grad_ladj, grad_log_scale, h, weight, z, log_scale, prefix, tiles, bound, soft
    )
    return grads


@_backward.register_fake
def _(
    grad_z: Tensor,
    grad_ladj: Tensor,
    grad_log_scale: Tensor,
    h: Tensor,
    weight: Tensor,
    z: Tensor,
    log_scale: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    bound: float,
    soft: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape), z.new_empty(prefix.shape[0]), z.new_empty(z.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.bound, ctx.soft = inputs
    z, _, log_scale = output
    ctx.save_for_backward(*tensors, z, log_scale)


@outside_autocast
def _autograd(ctx: Any, grad_z: Tensor, grad_ladj: Tensor, grad_log_scale: Tensor) -> tuple[Tensor | None, ...]:
    h, weight, bias, x, prefix, tiles, z, log_scale = ctx.saved_tensors
    if composite.needed_for((grad_z, grad_ladj, grad_log_scale)):

        def function(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return composite.affine_output(h, weight, bias, x, prefix, tiles, ctx.bound, ctx.soft)

        grads = composite.gradients(function, (h, weight, bias, x), (grad_z, grad_ladj, grad_log_scale))
        return *grads, None, None, None, None
    if (sink := sink_of(weight, ctx)) is not None:
        batch = grad_z, grad_ladj, grad_log_scale, h, z, log_scale
        grad_h, grad_bias, grad_x = sink.take(
            Factors("affine_output", batch, weight, prefix, tiles, (ctx.bound, ctx.soft)), True
        )
        return grad_h, None, grad_bias, grad_x, None, None, None, None
    grad_h, grad_weight, grad_bias, grad_x = _backward(
        grad_z, grad_ladj, grad_log_scale, h, weight, z, log_scale, prefix, tiles, ctx.bound, ctx.soft
    )
    return grad_h, grad_weight, grad_bias, grad_x, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def affine_output(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, prefix: Tensor, tiles: Tensor, bound: float, soft: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Applies a MADE's output layer and the affine transform that it parametrises: ``z = (x - shift) exp(-log_scale)``.

    Args:
        h: ``[N, H]``, the last hidden layer.
        weight: ``[numel]``, packed; rows ``2d`` and ``2d + 1`` give the shift and the raw log-scale of dimension ``d``.
        bias: ``[2D]``, interleaved in the same way.
        x: ``[N, D]``, the data.
        prefix: ``[2D]`` int64, how many hidden units each row sees.
        tiles: ``PackedLayout.table``, int32 ``[T, 4]``, on the CPU.
        bound: log-scales stay within ``±bound``; ``inf`` leaves them free.
        soft: bound by ``bound * tanh(u / bound)`` instead of by a clamp.

    Returns:
        ``z`` ``[N, D]``; ``ladj`` ``[N]``, the log absolute determinant in nats; ``log_scale`` ``[N, D]``, kept for
        the backward pass and for per-dimension terms.
    """
    if composite.needed():
        return composite.affine_output(h, weight, bias, x, prefix, tiles, bound, soft)
    result: tuple[Tensor, Tensor, Tensor] = _forward(
        h.contiguous(), weight.contiguous(), bias.contiguous(), x.contiguous(), prefix, tiles, bound, soft
    )
    return result
