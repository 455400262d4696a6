"""The arguments of a flow that is called many times, with what the backend derives from them.

The ops check every tensor at every call, which takes longer than the arithmetic of a small flow. Whoever holds a
``PreparedFlow`` has seen that its tensors are the same objects in the same memory as before; then only what a write
changes is left to look at.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.flow.args import FlowArgs, FlowBatch
from fastmaf.kernels.flow.forward import flow_backward, flow_forward, flow_forward_saving
from fastmaf.kernels.flow.inverse import flow_inverse
from fastmaf.kernels.native_args import FlowPlan, flow_plan
from fastmaf.kernels.op import is_recorded
from fastmaf.kernels.padding import PaddingInPlace

_version, _requires_grad = map(operator.attrgetter, ("_version", "requires_grad"))


def memory_of(tensors: Sequence[Tensor]) -> tuple[list[int], list[int], list[torch.dtype], bool]:
    """Returns what shows that tensors, the same objects, have other memory than before."""
    return (  # by maps and not in a loop: a small flow is called often
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.numel, tensors)),
        list(map(_dtype, tensors)),
        all(map(Tensor.is_contiguous, tensors)),
    )


_dtype = operator.attrgetter("dtype")


class _Known(NamedTuple):
    """What was derived while the constants had these versions; never written to, as other threads may read it."""

    versions: list[int]
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
        self._dtype = args.biases[0].dtype
        self._constants = [*args.prefixes, *args.panels, *args.schedules]
        self._known: _Known | None = None

    def plan(self, x: Tensor) -> FlowPlan | None:
        """Returns the plan of the native backend for a call on ``x``; None where an op must be called.

        The padding of the weights is zero then.
        """
        if x.dtype != self._dtype or not x.is_cpu or is_recorded(x) or composite.needed():
            return None
        if not hasattr(implementation("flow", x), "density"):
            return None
        try:
            versions = list(map(_version, self._constants))
        except RuntimeError:  # inference tensors have none
            return None
        known = self._known
        if known is None or known.versions != versions:
            plan = flow_plan(self.args, x.dtype)
            known = self._known = _Known(versions, plan, PaddingInPlace(*self.args[:1], *self.args[2:4]))
        else:
            known.padding.keep_zero()
        return known.plan if x.dim() == 2 and x.shape[1] == known.plan.features else None

    def _plan_without_gradients(self, x: Tensor) -> FlowPlan | None:
        """Returns ``plan``; None also where autograd records a call on ``x``."""
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() and (x.requires_grad or any(map(_requires_grad, self.parameters))):
            return None
        return self.plan(x)

    def density(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns ``Σ_d z²`` and ``ladj``, both ``[N]``; None where the flow must be called for them."""
        if (plan := self._plan_without_gradients(x)) is None:
            return None
        return implementation("flow", x).density(x.contiguous(), plan)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``flow_forward`` of ``x`` ``[N, D]``."""
        if (plan := self._plan_without_gradients(x)) is None:
            return flow_forward(x, self.args)
        z, ladj, _ = implementation("flow", x).forward(x.contiguous(), self.args, False, plan)
        return z, ladj

    def forward_saving(self, x: Tensor, plan: FlowPlan | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ``flow_forward_saving`` of ``x`` ``[N, D]``, contiguous, with the ``plan`` for it."""
        if plan is None:
            return flow_forward_saving(x, self.args)
        result: tuple[Tensor, Tensor, Tensor] = implementation("flow", x).forward(x, self.args, True, plan)
        return result

    def backward(self, batch: FlowBatch, plan: FlowPlan | None) -> list[Tensor]:
        """Returns the gradients of ``parameters``; with a plan only directly after ``forward_saving``."""
        if plan is None or plan.struct.weight_dtype != plan.struct.dtype:
            _, grad_weights, grad_biases = flow_backward(batch, self.args, False)
            return [*grad_weights, *grad_biases]
        grads: list[Tensor] = implementation("flow", batch.saved).backward_of_all(batch, plan)
        return grads

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``flow_inverse`` of ``z`` ``[N, D]``."""
        if (plan := self._plan_without_gradients(z)) is None:
            return flow_inverse(z, self.args)
        return implementation("flow", z).inverse(z.contiguous(), self.args, plan)
