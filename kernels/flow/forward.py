"""``flow_forward``: a flow's blocks and permutations, from data to base, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.factored_grad import GradientSink, sink_of
from fastmaf.kernels.flow.args import FLOW_SCHEMA, FlowArgs, FlowBatch, halves
from fastmaf.kernels.flow.saved import backward, first_x, saved_numel
from fastmaf.kernels.op import Op, records_gradients
from fastmaf.kernels.padding import keep_zero


def _forward(x: Tensor, *fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    args = FlowArgs(*fields[:-1])
    keep_zero(args.weights, args.prefixes, args.panels)
    return implementation("flow", x).forward(x, args, fields[-1])


def _forward_fake(x: Tensor, *fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, save = x.shape[0], fields[-1]
    return x.new_empty(x.shape), x.new_empty(n), x.new_empty(saved_numel(FlowArgs(*fields[:-1]), n) if save else 0)


def _backward(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    batch, args = FlowBatch(*arguments[:3]), FlowArgs(*arguments[3:-1])
    return implementation("flow", batch.grad_z).backward(batch, args, arguments[-1])


def _backward_fake(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad_z, args, need_grad_x = arguments[0], FlowArgs(*arguments[3:-1]), arguments[-1]
    grad_x = grad_z.new_empty(grad_z.shape[0] if need_grad_x else 0, grad_z.shape[1])
    return grad_x, [grad_z.new_empty(w.shape) for w in args.weights], [b.new_empty(b.shape) for b in args.biases]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, ladj, saved = output
    args, ctx.saves = FlowArgs(*inputs[1:-1]), inputs[-1]
    ctx.set_materialize_grads(False)  # that of `saved` would be as large as it is
    ctx.mark_non_differentiable(saved)
    ctx.need_grad_x = inputs[0].requires_grad
    # x is saved once already; for a second derivative it must be the tensor that came in.
    x = inputs[0] if ctx.need_grad_x else z.new_empty(0)
    ctx.save_for_backward(z, ladj, saved, x, *args.parameters)
    ctx.args = args.with_parameters([])  # the rest is never written to


@outside_autocast
def _autograd(ctx: Any, grad_z: Tensor | None, grad_ladj: Tensor | None, _: Any) -> tuple[Any, ...]:
    if not ctx.saves:
        raise RuntimeError(
            "flow_forward was called with save=False, for passes that record no gradients: nothing was saved for a "
            "backward pass"
        )
    z, ladj, saved, x, *parameters = ctx.saved_tensors
    args: FlowArgs = ctx.args.with_parameters(parameters)
    none = *([None] * len(part) for part in args[2:6]), None, None, None, None
    if composite.needed_for((grad_z, grad_ladj)):
        x = x if x.requires_grad else first_x(args, saved, z.shape[0])
        grads = composite.flow_gradients(composite.flow_forward, x, args, (grad_z, grad_ladj))
        return grads[0], *halves(grads[1:]), *none
    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
    batch = FlowBatch(grad_z, torch.zeros_like(ladj) if grad_ladj is None else grad_ladj, saved)
    result = backward_to_sinks(ctx, batch, args) or _BACKWARD(*batch, *args, ctx.need_grad_x)
    return result[0] if ctx.need_grad_x else None, *result[1:], *none


def backward_to_sinks(ctx: Any, batch: FlowBatch, args: FlowArgs, *plan: Any) -> tuple[Any, ...] | None:
    """Runs the backward pass with the weight gradients handed to their sinks; None if no weight has one.

    A plan is that of the arguments, for a backend that has some.
    """
    sinks = [sink_of(weight, ctx) for weight in args.weights]
    if not any(sinks):
        return None
    updates = _begin_updates(sinks)
    if updates is None:
        return backward(batch, args, ctx.need_grad_x, sinks)
    backend = implementation("flow", batch.grad_z)
    of_biases = [sink_of(bias, ctx) for bias in args.biases]
    bias_updates = _begin_updates(of_biases) if backend.UPDATES_BIASES else None
    grad_x, grad_biases = backend.adam_(batch, args, ctx.need_grad_x, updates, bias_updates, *plan)
    none = [None] * len(updates)
    return grad_x, none, none if bias_updates else grad_biases


def _begin_updates(sinks: Sequence[GradientSink | None]) -> list[Update] | None:
    """Begins the updates of all sinks; of none unless all are there and update at once."""
    begin = [sink.begin_update for sink in sinks if sink is not None and sink.begin_update is not None]
    return [begin_update() for begin_update in begin] if len(begin) == len(sinks) else None


_BACKWARD = Op(
    "flow_backward",
    f"(Tensor grad_z, Tensor grad_ladj, Tensor saved, {FLOW_SCHEMA}, bool need_grad_x) -> (Tensor, Tensor[], Tensor[])",
    _backward,
    _backward_fake,
)
_FORWARD = Op(
    "flow_forward",
    f"(Tensor x, {FLOW_SCHEMA}, bool save) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _autograd,
)


def flow_forward_saving(x: Tensor, args: FlowArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z``, ``ladj`` and what ``flow_backward`` needs; autograd sees nothing. ``x`` must be contiguous."""
    return _forward(x, *args, True)


def flow_backward(batch: FlowBatch, args: FlowArgs, need_grad_x: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns the gradients of ``x`` (``[0, D]`` when not needed), the packed weights and the biases."""
    return _backward(*batch, *args, need_grad_x)


def flow_forward(x: Tensor, args: FlowArgs) -> tuple[Tensor, Tensor]:
    """Applies blocks and permutations in turn.

    Args:
        x: ``[N, D]``.
        args: the blocks; see ``flow_args``.

    Returns:
        ``z`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dz/dx| in nats.
    """
    if composite.needed():
        return composite.flow_forward(x, args)
    x = x.contiguous()
    tensors = x, *args.weights, *args.biases
    save = records_gradients(tensors)
    z, ladj, _ = _FORWARD(x, *args, save, tensors=tensors if save else ())
    return z, ladj
