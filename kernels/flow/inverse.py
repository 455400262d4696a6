"""``flow_inverse``: a flow's blocks and permutations, from base to data, in one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.flow.args import FLOW_SCHEMA, FlowArgs, halves
from fastmaf.kernels.op import Op, records_gradients
from fastmaf.kernels.padding import keep_zero


def _inverse(z: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
    args = FlowArgs(*fields)
    keep_zero(args.weights, args.prefixes, args.panels)
    return implementation("flow", z).inverse(z, args)


def _inverse_fake(z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[0])


def _backward(grad_x: Tensor, grad_ladj: Tensor, x: Tensor, *fields: Any) -> list[Tensor]:
    args, need_parameters = FlowArgs(*fields[:-1]), fields[-1]
    return implementation("flow", x).inverse_backward(grad_x, grad_ladj, x, args, need_parameters)


def _backward_fake(grad_x: Tensor, grad_ladj: Tensor, x: Tensor, *fields: Any) -> list[Tensor]:
    parameters = [*fields[0], *fields[1]] if fields[-1] else []
    return [x.new_empty(t.shape) for t in (x, *parameters)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    args = FlowArgs(*inputs[1:])
    ctx.save_for_backward(inputs[0], output[0], *args.parameters)
    ctx.args = args.with_parameters([])  # the rest is never written to


@outside_autocast
def _autograd(ctx: Any, grad_x: Tensor, grad_ladj: Tensor) -> tuple[Any, ...]:
    z, x, *parameters = ctx.saved_tensors
    args: FlowArgs = ctx.args.with_parameters(parameters)
    if composite.needed_for((grad_x, grad_ladj)):
        grad_z, *grads = composite.flow_gradients(composite.flow_inverse, z, args, (grad_x, grad_ladj))
    else:
        needed = any([parameter.requires_grad for parameter in parameters])
        grad_z, *grads = _BACKWARD(grad_x, grad_ladj, x, *args, needed)
        grads = grads or [None] * len(parameters)
    none = ([None] * len(part) for part in args[2:6])
    return grad_z, *halves(grads), *none, None, None, None


_BACKWARD = Op(
    "flow_inverse_backward",
    f"(Tensor grad_x, Tensor grad_ladj, Tensor x, {FLOW_SCHEMA}, bool need_parameters) -> Tensor[]",
    _backward,
    _backward_fake,
)
_INVERSE = Op(
    "flow_inverse",
    f"(Tensor z, {FLOW_SCHEMA}) -> (Tensor, Tensor)",
    _inverse,
    _inverse_fake,
    _setup_context,
    _autograd,
)


def flow_inverse(z: Tensor, args: FlowArgs) -> tuple[Tensor, Tensor]:
    """Inverts blocks and permutations in turn, exactly; of each block, ``x = z exp(log_scale(x)) + shift(x)``, one step
    per level.

    Args:
        z: ``[N, D]``.
        args: the blocks in the order of inversion: ``FlowArgs.inverted`` of those of ``flow_forward``.

    Returns:
        ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz| in nats.
    """
    if composite.needed():
        return composite.flow_inverse(z, args)
    z = z.contiguous()
    if not records_gradients((z, *args.weights, *args.biases)):
        return _INVERSE(z, *args)
    # Block by block, so that the backward pass holds the new gradients of one block only beside those that it adds to.
    ladj = z.new_zeros(z.shape[0])
    for block in args.single_blocks():
        z, term = _INVERSE(z, *block, tensors=(z, *block.weights, *block.biases))
        ladj = ladj + term
    return z, ladj
