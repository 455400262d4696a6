"""``masked_linear``: a linear layer on packed storage, ``y = act(W x + b)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.factored_grad import FactoredGrad, sink_of
from fastmaf.kernels.masked_linear.args import LINEAR_SCHEMA, LinearArgs, LinearBatch, check_activation
from fastmaf.kernels.op import Op
from fastmaf.kernels.padding import keep_zero


def _forward(x: Tensor, *fields: Any) -> Tensor:
    args = LinearArgs(*fields)
    keep_zero([args.weight], [args.prefix], [args.panels])
    return implementation("masked_linear", x).forward(x, args)


def _forward_fake(x: Tensor, *fields: Any) -> Tensor:
    return x.new_empty(x.shape[0], LinearArgs(*fields).bias.shape[0])


def _backward(grad_y: Tensor, x: Tensor, y: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, need_grad_x = arguments
    batch, args = LinearBatch(grad_y, x, y), LinearArgs(*fields)
    return implementation("masked_linear", x).backward(batch, args, need_grad_x, True)


def _backward_fake(grad_y: Tensor, x: Tensor, y: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, need_grad_x = arguments[0], arguments[-1]
    grad_x = x.new_empty(x.shape if need_grad_x else 0)
    return grad_x, x.new_empty(weight.shape), grad_y.new_empty(grad_y.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *tensors, ctx.activation, ctx.weight_scale = inputs
    ctx.need_grad_x = x.requires_grad
    # The identity's backward never reads y: keep it alive only for an activation that does.
    y = output if ctx.activation != "identity" else x.new_empty(0)
    ctx.save_for_backward(x, y, *tensors)


@outside_autocast
def _autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, y, *tensors = ctx.saved_tensors
    args, need_grad_x = LinearArgs._make([*tensors, ctx.activation, ctx.weight_scale]), ctx.need_grad_x
    if composite.needed_for([grad_y]):
        grads = composite.gradients(
            lambda x, weight, bias: [composite.masked_linear(x, args._replace(weight=weight, bias=bias))],
            (x, args.weight, args.bias),
            [grad_y],
        )
        return *grads, None, None, None, None
    grad_weight: Tensor | None = None
    if (sink := sink_of(args.weight, ctx)) is not None:
        factored = FactoredGrad("masked_linear", LinearBatch(grad_y, x, y), args)
        grad_x, grad_bias = sink.take(factored, need_grad_x)
    else:
        grad_x, grad_weight, grad_bias = _BACKWARD(grad_y, x, y, *args, need_grad_x)
    return grad_x if need_grad_x else None, grad_weight, grad_bias, None, None, None, None


_BACKWARD = Op(
    "masked_linear_backward",
    f"(Tensor grad_y, Tensor x, Tensor y, {LINEAR_SCHEMA}, bool need_grad_x) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_FORWARD = Op(
    "masked_linear", f"(Tensor x, {LINEAR_SCHEMA}) -> Tensor", _forward, _forward_fake, _setup_context, _autograd
)


def masked_linear(x: Tensor, args: LinearArgs) -> Tensor:
    """Applies a masked linear layer, ``y = act(W x + b)``, with ``W`` in packed staircase storage.

    Args:
        x: ``[N, in]``.
        args: the layer.

    Returns:
        ``y`` ``[N, out]``. The gradient of the weight is zero in the padding.

    Raises:
        ValueError: the activation is unknown.
    """
    check_activation(args.activation)
    if composite.needed():
        return composite.masked_linear(x, args)
    tensors = x.contiguous(), args.weight.contiguous(), args.bias.contiguous()
    return _FORWARD(*tensors, *tuple(args)[2:], tensors=tensors)
