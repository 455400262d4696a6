"""Registers ``fastmaf::masked_linear`` and its backward with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.backends import implementation
from fastmaf.kernels.factors import Factors, sink_of
from fastmaf.kernels.padding import keep_zero

# Each must be differentiable from its value alone: the backward pass keeps y, not what went into the activation.
ACTIVATIONS = ("identity", "relu")


def check_activation(activation: str) -> None:
    """Raises ValueError unless the ops know the activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}; found {activation!r}")


@torch.library.custom_op(
    "fastmaf::masked_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor prefix, Tensor tiles, str activation) -> Tensor",
)
def _forward(x: Tensor, weight: Tensor, bias: Tensor, prefix: Tensor, tiles: Tensor, activation: str) -> Tensor:
    keep_zero([weight], [prefix], [tiles])
    result: Tensor = implementation("masked_linear", x).forward(x, weight, bias, prefix, tiles, activation)
    return result


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, prefix: Tensor, tiles: Tensor, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], bias.shape[0])


@torch.library.custom_op(
    "fastmaf::masked_linear_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_y, Tensor x, Tensor y, Tensor weight, Tensor prefix, Tensor tiles, str activation, bool "
        "need_grad_x)"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
def _backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    activation: str,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = implementation("masked_linear", x)
    grads: tuple[Tensor, Tensor, Tensor] = backend.backward(
        grad_y, x, y, weight, prefix, tiles, activation, need_grad_x
    )
    return grads


@_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    activation: str,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape) if need_grad_x else x.new_empty(0)
    return grad_x, weight.new_empty(weight.shape), grad_y.new_empty(grad_y.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, prefix, tiles, ctx.activation = inputs
    # The identity's backward never reads y: keep it alive only for an activation that does.
    y = output if ctx.activation != "identity" else x.new_empty(0)
    ctx.save_for_backward(x, weight, bias, prefix, tiles, y)


@outside_autocast
def _autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, prefix, tiles, y = ctx.saved_tensors
    if composite.needed_for([grad_y]):

        def function(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
            return [composite.masked_linear(x, weight, bias, prefix, tiles, ctx.activation)]

        grads = composite.gradients(function, (x, weight, bias), [grad_y])
        return *grads, None, None, None
    need_grad_x = ctx.needs_input_grad[0]
    if (sink := sink_of(weight, ctx)) is not None:
        factors = Factors("masked_linear", (grad_y, x, y), weight, prefix, tiles, (ctx.activation,))
        grad_x, grad_bias = sink.take(factors, need_grad_x)
        return grad_x if need_grad_x else None, None, grad_bias, None, None, None
    grad_x, grad_weight, grad_bias = _backward(grad_y, x, y, weight, prefix, tiles, ctx.activation, need_grad_x)
    return grad_x if need_grad_x else None, grad_weight, grad_bias, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor, prefix: Tensor, tiles: Tensor, activation: str = "identity"
) -> Tensor:
    """Applies a masked linear layer, ``y = act(W x + b)``, with ``W`` in packed staircase storage.

    Args:
        x: ``[N, in]``.
        weight: ``[numel]``, packed as ``PackedLayout`` lays it out, zero in the padding.
        bias: ``[out]``.
        prefix: ``[out]`` int64, how many inputs each output sees; on the device of ``x``.
        tiles: ``PackedLayout.table``, int32 ``[T, 4]``, on the CPU.
        activation: ``"identity"`` or ``"relu"``.

    Returns:
        ``y`` ``[N, out]``. The gradient of ``weight`` is zero in the padding.

    Raises:
        ValueError: the activation is unknown.
    """
    check_activation(activation)
    if composite.needed():
        return composite.masked_linear(x, weight, bias, prefix, tiles, activation)
    result: Tensor = _forward(x.contiguous(), weight.contiguous(), bias.contiguous(), prefix, tiles, activation)
    return result
