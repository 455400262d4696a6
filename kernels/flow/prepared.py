"""The arguments of a flow that is called many times, with what the backend derives from them.

The ops check every tensor at every call, which takes longer than the arithmetic of a small flow. Whoever holds a
``PreparedFlow`` has seen that its tensors are the same objects in the same memory as before; then only what a write
changes is left to look at.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.flow.args import FlowArgs, FlowBatch
from fastmaf.kernels.flow.forward import backward_to_sinks, flow_backward, flow_forward, flow_forward_saving
from fastmaf.kernels.flow.inverse import flow_inverse
from fastmaf.kernels.flow.native_plan import FlowPlan, flow_plan
from fastmaf.kernels.flow.saved import first_x
from fastmaf.kernels.op import is_recorded
from fastmaf.kernels.padding import PaddingInPlace

Memory: TypeAlias = tuple[list[int], list[int], list[torch.dtype], bool]
_version, _dtype, _requires_grad = map(operator.attrgetter, ("_version", "dtype", "requires_grad"))
_FEW = 1 << 20  # numbers: of more, each gradient has memory of its own, on huge pages


def memory_of(tensors: Sequence[Tensor]) -> Memory:
    """Returns what shows that tensors, the same objects, have other memory than before."""
    return (  # by maps and not in a loop: a small flow is called often
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.numel, tensors)),
        list(map(_dtype, tensors)),
        all(map(Tensor.is_contiguous, tensors)),
    )


class _Known(NamedTuple):
    """What was derived while the constants had these versions; never written to, as other threads may read it."""

    versions: list[int]
    memory: Memory
    plan: FlowPlan
    padding: PaddingInPlace


class PreparedFlow:
    """A flow for the native backend; calls for another one, and calls that are recorded, go to the ops.

    Args:
        args: of the ops. The caller sees to it that its parameters and permutations are in the same memory at each
            call, as ``memory_of`` tells.
    """

    def __init__(self, args: FlowArgs) -> None:
        self.args = args
        self.parameters = args.parameters
        self._dtype, self._on_cpu = args.biases[0].dtype, args.biases[0].is_cpu
        self._constants = [*args.prefixes, *args.panels, *args.schedules]
        self._known: _Known | None = None

    def plan(self, x: Tensor) -> FlowPlan | None:
        """Returns the plan of the native backend for a call on ``x``; None where an op must be called.

        The padding of the weights is zero then.
        """
        if x.dtype != self._dtype or not (x.is_cpu and self._on_cpu) or is_recorded(x) or composite.needed():
            return None
        if _native(x) is None:
            return None
        try:
            versions = list(map(_version, self._constants))
        except RuntimeError:  # inference tensors have none
            return None
        known = self._known
        if known is None or known.versions != versions:
            plan = flow_plan(self.args, x.dtype)
            padding = PaddingInPlace(*self.args[:1], *self.args[2:4])
            known = self._known = _Known(versions, memory_of(self.parameters), plan, padding)
        else:
            known.padding.keep_zero()
        return known.plan if x.dim() == 2 and x.shape[1] == known.plan.features else None

    def _records_gradients(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(map(_requires_grad, self.parameters)))

    def log_density(self, x: Tensor) -> Tensor | None:
        """Returns the log-density ``[N]`` of x where the density of z is the standard normal one; None where
        ``forward`` must be called for it.
        """
        if torch.compiler.is_compiling() or (plan := self.plan(x)) is None:
            return None
        x = x.contiguous()
        if self._records_gradients(x):
            result: Tensor = _LogDensity.apply(self, plan, x, *self.parameters)
            return result
        squares, ladj, *_ = implementation("flow", x).density(x, plan, False)
        return _log_density(squares, ladj, x.shape[1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``flow_forward`` of ``x`` ``[N, D]``."""
        if torch.compiler.is_compiling() or self._records_gradients(x) or (plan := self.plan(x)) is None:
            return flow_forward(x, self.args)
        z, ladj, _ = implementation("flow", x).forward(x.contiguous(), self.args, False, plan)
        return z, ladj

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``flow_inverse`` of ``z`` ``[N, D]``."""
        if torch.compiler.is_compiling() or self._records_gradients(z) or (plan := self.plan(z)) is None:
            return flow_inverse(z, self.args)
        result: tuple[Tensor, Tensor] = implementation("flow", z).inverse(z.contiguous(), self.args, plan)
        return result

    def log_density_saving(self, x: Tensor, plan: FlowPlan | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ``log_density``, ``z`` and what ``backward`` needs, with the ``plan`` for ``x`` ``[N, D]``, which is
        contiguous; autograd sees nothing.
        """
        if plan is None:
            z, ladj, saved = flow_forward_saving(x, self.args)
            squares = z.square().sum(1)
        else:
            squares, ladj, z, saved = implementation("flow", x).density(x, plan, True)
        return _log_density(squares, ladj, x.shape[1]), z, saved

    def backward(self, batch: FlowBatch, plan: FlowPlan | None) -> list[Tensor]:
        """Returns the gradients of ``parameters``; with a plan only directly after ``log_density_saving``."""
        native = _native(batch.saved)
        if native and plan and plan.struct.weight_dtype == plan.struct.dtype and sum(plan.numels) <= _FEW:
            grads: list[Tensor] = native.backward_of_all(batch, plan)
            return grads
        _, grad_weights, grad_biases = flow_backward(batch, self.args, False)
        return [*grad_weights, *grad_biases]

    def is_in_place(self, parameters: Sequence[Tensor]) -> bool:
        """Returns whether the parameters are in the memory that the plan points to."""
        return self._known is not None and memory_of(parameters) == self._known.memory


def _native(x: Tensor) -> Any:
    """Returns the native backend if it serves ``x``, else None."""
    backend = implementation("flow", x)
    return backend if hasattr(backend, "density") else None


def _log_density(squares: Tensor, ladj: Tensor, features: int) -> Tensor:
    return ladj.sub_(squares, alpha=0.5).sub_(features * composite.HALF_LOG_2PI)


class _LogDensity(torch.autograd.Function):
    """``log_density`` as one node of the graph: each node takes longer than the arithmetic of a small flow."""

    @staticmethod
    def forward(ctx: Any, flow: PreparedFlow, plan: FlowPlan, x: Tensor, *parameters: Tensor) -> Tensor:
        result, z, saved = flow.log_density_saving(x, plan)
        ctx.flow, ctx.plan, ctx.need_grad_x = flow, plan, ctx.needs_input_grad[2]
        # x is saved once already; for a second derivative it must be the tensor that came in.
        ctx.save_for_backward(z, saved, x if ctx.need_grad_x else None, *parameters)
        return result

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        z, saved, x, *parameters = ctx.saved_tensors
        args: FlowArgs = ctx.flow.args
        if composite.needed_for((grad,)):
            x = first_x(args, saved, z.shape[0]) if x is None else x
            return None, None, *composite.flow_gradients(composite.flow_log_density, x, args, (grad,))
        batch = FlowBatch(z * -grad[:, None], grad.contiguous(), saved)
        plan = ctx.plan if _native(z) and ctx.flow.is_in_place(parameters) else None
        result = backward_to_sinks(ctx, batch, args, *([] if plan is None else [plan]))
        if result is None and not ctx.need_grad_x and plan is not None:
            return None, None, None, *ctx.flow.backward(batch, plan)
        grad_x, grad_weights, grad_biases = result or flow_backward(batch, args, ctx.need_grad_x)
        return None, None, grad_x if ctx.need_grad_x else None, *grad_weights, *grad_biases
