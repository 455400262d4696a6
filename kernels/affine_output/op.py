"""``affine_output``: a MADE's output layer and the affine transform that it parametrises."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.affine_output.args import AFFINE_SCHEMA, AffineArgs, AffineBatch
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.factored_grad import FactoredGrad, sink_of
from fastmaf.kernels.op import Op
from fastmaf.kernels.padding import keep_zero


def _forward(h: Tensor, x: Tensor, *fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    args = AffineArgs(*fields)
    keep_zero([args.weight], [args.prefix], [args.panels])
    return implementation("affine_output", x).forward(h, x, args)


def _forward_fake(h: Tensor, x: Tensor, *fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0]), x.new_empty(x.shape)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, args = AffineBatch(*arguments[:7]), AffineArgs(*arguments[7:])
    return implementation("affine_output", batch.z).backward(batch, args, True, True)


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, args = AffineBatch(*arguments[:7]), AffineArgs(*arguments[7:])
    z, h = batch.z, batch.h
    return h.new_empty(h.shape), h.new_empty(args.weight.shape), z.new_empty(args.bias.shape), z.new_empty(z.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.map, ctx.weight_scale = inputs
    z, _, log_scale = output
    ctx.save_for_backward(z, log_scale, *tensors)


@outside_autocast
def _autograd(ctx: Any, grad_z: Tensor, grad_ladj: Tensor, grad_log_scale: Tensor) -> tuple[Tensor | None, ...]:
    z, log_scale, h, x, *tensors = ctx.saved_tensors
    grads, args = (grad_z, grad_ladj, grad_log_scale), AffineArgs._make([*tensors, ctx.map, ctx.weight_scale])
    if composite.needed_for(grads):
        values = composite.gradients(
            lambda h, x, weight, bias: composite.affine_output(h, x, args._replace(weight=weight, bias=bias)),
            (h, x, args.weight, args.bias),
            grads,
        )
        return *values, None, None, None, None
    batch = AffineBatch(*grads, h, z, log_scale, x)
    grad_weight: Tensor | None = None
    if (sink := sink_of(args.weight, ctx)) is not None:
        grad_h, grad_bias, grad_x = sink.take(FactoredGrad("affine_output", batch, args), True)
    else:
        grad_h, grad_weight, grad_bias, grad_x = _BACKWARD(*batch, *args)
    return grad_h, grad_x, grad_weight, grad_bias, None, None, None, None


_BACKWARD = Op(
    "affine_output_backward",
    "(Tensor grad_z, Tensor grad_ladj, Tensor grad_log_scale, Tensor h, Tensor z, Tensor log_scale, Tensor x, "
    f"{AFFINE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_FORWARD = Op(
    "affine_output",
    f"(Tensor h, Tensor x, {AFFINE_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _autograd,
)


def affine_output(h: Tensor, x: Tensor, args: AffineArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Applies a MADE's output layer and the affine transform that it parametrises, such as
    ``z = (x - shift) exp(-log_scale)``; see ``AffineMap``.

    Args:
        h: ``[N, H]``, the last hidden layer.
        x: ``[N, D]``, the data.
        args: the layer.

    Returns:
        ``z`` ``[N, D]``; ``ladj`` ``[N]``, the log absolute determinant in nats; ``log_scale`` ``[N, D]``, saved for
        the backward pass and for per-dimension terms.
    """
    if composite.needed():
        return composite.affine_output(h, x, args)
    tensors = h.contiguous(), x.contiguous(), args.weight.contiguous(), args.bias.contiguous()
    return _FORWARD(*tensors, *tuple(args)[2:], tensors=tensors)
