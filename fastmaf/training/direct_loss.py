"""The loss of a small flow and its gradients, without a graph of autograd."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

from fastmaf import hooks
from fastmaf.flows import Flow
from fastmaf.kernels import composite, dispatch
from fastmaf.kernels.flow.args import FlowBatch
from fastmaf.kernels.flow.native_plan import FlowPlan
from fastmaf.kernels.flow.prepared import PreparedFlow

_requires_grad, _grad, _hooks, _later_hooks = map(
    operator.attrgetter, ("requires_grad", "grad", "_backward_hooks", "_post_accumulate_grad_hooks")
)
_METHODS = {name: getattr(Flow, name) for name in ("log_prob", "forward")}


class DirectLoss:
    """The mean negative log-likelihood of a batch, with the values and gradients of ``-flow.log_prob(x).mean()``.

    Autograd visits a node for each parameter, which takes longer than the arithmetic of a small flow.

    Attributes:
        value: the loss.
    """

    def __init__(self, x: Tensor, prepared: PreparedFlow, plan: FlowPlan | None) -> None:
        self._prepared, self._plan = prepared, plan
        with torch.no_grad():
            density, self._z, self._saved = prepared.log_density_saving(x.contiguous(), plan)
            self.value = -density.mean()

    @classmethod
    def of(cls, flow: Flow, x: Tensor) -> DirectLoss | None:
        """Returns the loss of a batch ``[N, D]``, or None where autograd is needed: for hooks, other transforms than
        blocks and permutations, other bases, parameters that are shared, frozen or computed, modes, and GPUs.
        """
        if type(x) is not Tensor or x.dim() != 2 or not len(x) or x.requires_grad or x.device.type != "cpu":
            return None
        if dispatch.chosen() == "triton" or not torch.is_grad_enabled():
            return None
        if torch.is_autocast_enabled("cpu") or torch.is_anomaly_enabled():
            return None
        if any(getattr(type(flow), name) is not method or name in vars(flow) for name, method in _METHODS.items()):
            return None
        if hooks.is_called(flow) or composite.needed() or not flow._fuses_base:
            return None
        run = flow._runs.single(flow._transforms())
        if run is None or not _are_plain(run.forward.parameters):
            return None
        plan = run.forward.plan(x)
        if plan is None:
            flow._check("x", x)
        return cls(x, run.forward, plan)

    @torch.no_grad()
    def backward(self) -> None:
        """Stores the gradients of all parameters in ``grad``, which must be None."""
        n = len(self._z)
        batch = FlowBatch(self._z * (1 / n), self._z.new_full((n,), -1 / n), self._saved)
        for parameter, grad in zip(self._prepared.parameters, self._prepared.backward(batch, self._plan), strict=True):
            parameter.grad = grad


def _are_plain(parameters: list[Tensor]) -> bool:
    """Returns whether each is used once, to be trained, and without a gradient or hooks."""
    return (  # by maps and not in a loop: a small flow is trained in many steps
        len(set(map(id, parameters))) == len(parameters)
        and set(map(type, parameters)) == {nn.Parameter}
        and all(map(_requires_grad, parameters))
        and set(map(_grad, parameters)) == {None}
        and not any(map(_hooks, parameters))
        and not any(map(_later_hooks, parameters))
    )
