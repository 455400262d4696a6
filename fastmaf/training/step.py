"""Maximum-likelihood training steps, with the guards that keep deep flows in mixed orders from blowing up.

A flow of several blocks multiplies its scales: one step too far at one block, and the next batch's NLL is off by
orders of magnitude, from which Adam's moments take epochs to recover. Natural order in every block is tame; orders that
alternate are not. The guards act on quantities *per dimension*, so that one setting serves every image size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaf.flows import Flow
from fastmaf.training.cuda_graphs import GraphedSteps
from fastmaf.training.fused_adam import FusedAdam
from fastmaf.training.loss_checks import NonFiniteLossError
from fastmaf.validation import not_validating


@dataclass(frozen=True)
class Guards:
    """What holds a training step back; the default holds nothing.

    Attributes:
        warmup_steps: the learning rate rises linearly over this many steps.
        max_grad_norm: gradients of the loss per dimension (nats/dim) are scaled down to this L2 norm; None to leave
            them.
        max_leap: a step whose loss lies more than this many nats/dim above the running mean is skipped; None to take
            all.
    """

    warmup_steps: int = 0
    max_grad_norm: float | None = None
    max_leap: float | None = None

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more; found {self.warmup_steps}")
        for name in ("max_grad_norm", "max_leap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, or None for no limit; found {value}")


class StepReport(NamedTuple):
    """What one step did: the batch's mean NLL in nats, before the step, and whether its update was skipped."""

    nll: float
    skipped: bool


class TrainingStep:
    """One guarded step of maximum likelihood: ``step(x)`` minimises the mean NLL of a batch.

    Args:
        flow: the model.
        optimizer: any torch optimiser over its parameters; its learning rates at this moment are what warm-up rises to.
        guards: see ``Guards``.
        graphs: on a GPU, replay steps of ``FusedAdam`` as CUDA graphs, from the second batch of a shape on.
    """

    _MEMORY = 0.9  # of the running mean of the loss, per step

    def __init__(
        self,
        flow: Flow,
        optimizer: torch.optim.Optimizer,
        guards: Guards | None = None,
        *,
        graphs: bool = False,
    ) -> None:
        self.flow = flow
        self.optimizer = optimizer
        self.guards = guards or Guards()
        self._graphs: GraphedSteps | None = None
        if graphs and isinstance(optimizer, FusedAdam):
            self._graphs = GraphedSteps(flow, optimizer, clips=self.guards.max_grad_norm is not None)
        self.steps = 0
        self._lr = [float(group["lr"]) for group in optimizer.param_groups]
        self._usual_nll: float | None = None
        self._warming = self.guards.warmup_steps > 0

    def __call__(self, x: Tensor) -> StepReport:
        """Takes one step on the batch ``x`` ``[N, D]``.

        Raises:
            NonFiniteLossError: the loss is not finite; nothing was changed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        graphed = None if self._graphs is None else self._graphs.of(x)
        with not_validating(self.flow):  # the loss is looked at below
            loss = -self.flow.log_prob(x).mean() if graphed is None else graphed.forward(x)
        nll = float(loss.detach())
        if not math.isfinite(nll):
            raise NonFiniteLossError(f"the NLL of a batch became {nll} at step {self.steps + 1}")
        self.steps += 1
        if self._leaps(nll):
            return StepReport(nll, skipped=True)
        if self._warming:
            for group, lr in zip(self.optimizer.param_groups, self._lr, strict=True):
                group["lr"] = lr * min(1.0, self.steps / self.guards.warmup_steps)
            # Afterwards the learning rates are the user's: a scheduler may set them.
            self._warming = self.steps < self.guards.warmup_steps
        if graphed is not None:
            return StepReport(nll, skipped=not graphed.minimize(self._max_norm()))
        taken = self._minimize(loss)
        if taken and self._graphs is not None:
            self._graphs.stepped(x)
        return StepReport(nll, skipped=not taken)

    def _minimize(self, loss: Tensor) -> bool:
        """Takes a step on a finite loss; says whether it was taken."""
        if isinstance(self.optimizer, FusedAdam):
            limit = None if self.guards.max_grad_norm is None else self._max_norm()
            return self.optimizer.minimize(loss, limit, check_finite=False)
        loss.backward()
        if not self._clip():
            return False
        self.optimizer.step()
        return True

    def _leaps(self, nll: float) -> bool:
        usual, limit = self._usual_nll, self.guards.max_leap
        if limit is None:
            return False
        leap = usual is not None and (nll - usual) / self.flow.features > limit
        # A leap counts as no more than the limit, but it does count: if the loss stays high, training goes on from
        # there.
        seen = nll if usual is None else min(nll, usual + limit * self.flow.features)
        self._usual_nll = seen if usual is None else self._MEMORY * usual + (1 - self._MEMORY) * seen
        return leap

    def _max_norm(self) -> float:
        """Returns the limit on the norm of the loss's gradients."""
        limit = self.guards.max_grad_norm
        return math.inf if limit is None else limit * self.flow.features

    def _clip(self) -> bool:
        """Scales the gradients down where they exceed the limit; says whether they are finite."""
        if self.guards.max_grad_norm is None:
            return True
        grads = [p.grad for p in self.flow.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) / self.flow.features
        if not math.isfinite(norm):
            return False
        if norm > self.guards.max_grad_norm:
            torch._foreach_mul_(grads, self.guards.max_grad_norm / norm)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns the guards' own state; plain JSON types."""
        return {"steps": self.steps, "usual_nll": self._usual_nll, "warming": self._warming}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.steps, self._usual_nll, self._warming = state["steps"], state["usual_nll"], state["warming"]
