"""Guarded maximum-likelihood training steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaf.flows import Flow
from fastmaf.nn import MaskedLinear
from fastmaf.training.agreement import average_statistics, check_agreement
from fastmaf.training.direct_loss import DirectLoss
from fastmaf.training.exchange import Exchange
from fastmaf.training.fused_adam import FusedAdam
from fastmaf.training.graphed_step import GraphedSteps
from fastmaf.training.guards import Guards, NonFiniteLossError, check_processes, clip_scale
from fastmaf.validation import not_validating

_FEW_WEIGHTS = 1 << 16


class StepReport(NamedTuple):
    """The result of one training step.

    Attributes:
        nll: mean negative log-likelihood of the batch before the step, in nats; over all processes.
        skipped: whether the parameters were left as they were.

    Example:
        >>> flow = fastmaf.MAF(features=2, blocks=1, hidden_features=8)
        >>> step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters()))
        >>> step(torch.randn(16, 2)).skipped
        False
    """

    nll: float
    skipped: bool


class TrainingStep:
    """One guarded step of maximum likelihood on a batch x ``[N, D]``, with a context c ``[N, C]`` if the flow has one:

        minimise  -(1/N) Σ_n log p(x_n | c_n)

    With a ``FusedAdam`` of several processes, N and the sum are those of all processes' batches together, and all of
    them take the same step: one process with the whole batch takes it too, to rounding. Before the first step the
    processes check that they hold the same flow, and after each step the running statistics of a ``BatchNorm`` are
    their means over the processes.

    Args:
        flow: the model.
        optimizer: any torch optimiser over its parameters; ``FusedAdam`` is the fastest, and the only one for several
            processes. Warm-up rises to the learning rates that it has now.
        guards: limits on the step; see ``Guards``. None for no limits.
        graphs: on a GPU, replay steps of ``FusedAdam`` as CUDA graphs, from the second batch of a shape on. Steps of
            several processes are not replayed.
        shard_optimizer: split the moments of a ``FusedAdam`` of several processes among them, each of which then holds
            those of a range of the panels of the weights: for models that do not fit. The steps are the same; in each,
            all weights are sent once. See ``FusedAdam.shard``.

    Raises:
        ValueError: the optimiser holds none of the flow's parameters, ``graphs`` are asked for a flow with a context,
            or ``shard_optimizer`` for another optimiser than ``FusedAdam``.

    Example:
        >>> flow = fastmaf.MAF(6, 2, (16,), order="natural", seed=0)
        >>> step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2))
        >>> reports = [step(torch.zeros(4, 6)) for _ in range(2)]
        >>> reports[1].nll < reports[0].nll
        True
    """

    _DECAY = 0.9  # of the running mean of the loss, per step

    def __init__(
        self,
        flow: Flow,
        optimizer: torch.optim.Optimizer,
        guards: Guards | None = None,
        *,
        graphs: bool = False,
        shard_optimizer: bool = False,
    ) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if held.isdisjoint(map(id, flow.parameters())):
            raise ValueError("the optimizer holds no parameter of the flow: build it with flow.parameters()")
        if graphs and flow.context_features:
            raise ValueError("steps of a flow with a context are not replayed as CUDA graphs: expected graphs=False")
        if shard_optimizer:
            if not isinstance(optimizer, FusedAdam):
                raise ValueError(f"shard_optimizer is for FusedAdam; found {type(optimizer).__name__}")
            packed = (module for module in flow.modules() if isinstance(module, MaskedLinear))
            optimizer.shard({layer.weight: layer.layout for layer in packed})
        self.flow = flow
        self.optimizer = optimizer
        self.guards = guards or Guards()
        self.steps = 0
        self._lr = [float(group["lr"]) for group in optimizer.param_groups]
        self._running_nll: float | None = None
        self._warming = self.guards.warmup_steps > 0
        limit = self.guards.max_grad_norm
        self._max_norm = None if limit is None else limit * flow.features  # of the gradients of the loss
        self._graphs: GraphedSteps | None = None
        self._exchange = optimizer.exchange if isinstance(optimizer, FusedAdam) else None
        self._agreed = False  # the processes' flows were compared
        if graphs and isinstance(optimizer, FusedAdam) and self._exchange is None:
            self._graphs = GraphedSteps(flow, optimizer, self._max_norm)
        layers = flow._layers()
        self._weights = sum(layer.layout.numel for layer in layers)
        self._factors_per_sample = sum(layer.in_features + layer.out_features for layer in layers)

    def __call__(self, x: Tensor, context: Tensor | None = None) -> StepReport:
        """Takes one step on the batch ``x`` ``[N, D]``, given ``context`` ``[N, C]`` for a flow that has one.

        Raises:
            ValueError: see ``Flow.log_prob``.
            NonFiniteLossError: the loss is not finite; nothing was changed.
            ProcessesDifferError: at the first step: processes hold different flows.
            ProcessFailedError: the densities of a process raised an error, which the message names: no process has
                taken the step, and others can follow.
            RuntimeError: several processes run, over which the optimiser does not average gradients.
        """
        if self._exchange is None:
            check_processes()
        elif not self._agreed:
            check_agreement(self.flow, self._exchange)
            self._agreed = True
        self.optimizer.zero_grad(set_to_none=True)
        graphed = None if self._graphs is None or context is not None else self._graphs.forward(x)
        direct: DirectLoss | None = None
        try:
            if graphed is not None:
                loss = graphed.loss
            else:
                with not_validating():  # the loss is checked below
                    direct = DirectLoss.of(self.flow, x) if context is None and self._is_direct(len(x)) else None
                    loss = self._loss(x, context) if direct is None else direct.value
            nll = loss.item()
        except Exception as error:
            if self._exchange is not None:
                self._exchange.fail(error)
            raise
        if self._exchange is not None:
            loss, nll = _of_all(loss, nll, len(x), self._exchange)
            average_statistics(self.flow, self._exchange)
        if not math.isfinite(nll):
            empty = "" if len(x) else ": the batch has no rows"
            raise NonFiniteLossError(f"the NLL of a batch became {nll} at step {self.steps + 1}{empty}")
        self.steps += 1
        if self._jumps(nll):
            return StepReport(nll, skipped=True)
        if self._warming:
            for group, lr in zip(self.optimizer.param_groups, self._lr, strict=True):
                group["lr"] = lr * min(1.0, self.steps / self.guards.warmup_steps)
            # Afterwards the learning rates are the user's: a scheduler may set them.
            self._warming = self.steps < self.guards.warmup_steps
        if graphed is not None:
            return StepReport(nll, skipped=not graphed.minimize())
        taken = self._minimize(loss if direct is None else direct, len(x))
        if taken and self._graphs is not None:
            self._graphs.ran_eagerly(x)
        return StepReport(nll, skipped=not taken)

    def _loss(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Returns the mean NLL of a batch, or their sum where several processes train together."""
        log_prob = self.flow.log_prob(x) if context is None else self.flow.log_prob(x, context)
        return -(log_prob.mean() if self._exchange is None else log_prob.sum())

    def _minimize(self, loss: Tensor | DirectLoss, batch: int) -> bool:
        """Takes a step on a finite loss; returns whether it was taken."""
        factored = self._exchange is not None or not self._stores_gradients(batch)
        if isinstance(self.optimizer, FusedAdam) and isinstance(loss, Tensor) and factored:
            return self.optimizer.minimize(loss, self._max_norm, check_finite=False)
        loss.backward()
        if self._max_norm is not None:
            grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            if not math.isfinite(norm):
                return False
            if (scale := clip_scale(norm, self._max_norm)) != 1.0:
                torch._foreach_mul_(grads, scale)
        self.optimizer.step()
        return True

    def _stores_gradients(self, batch: int) -> bool:
        """Returns whether to store gradients instead of factors: where they are smaller, a step is faster that way.

        Without clipping no factors are kept, so gradients are stored only if they are small anyway.
        """
        small = self._max_norm is not None or self._weights <= _FEW_WEIGHTS
        return small and self._graphs is None and batch * self._factors_per_sample > self._weights

    def _is_direct(self, batch: int) -> bool:
        """Returns whether to do without autograd where it is possible: it takes time where gradients are small."""
        if self._graphs is not None or self._exchange is not None or not isinstance(self.optimizer, FusedAdam):
            return False
        return self._weights <= _FEW_WEIGHTS or self._stores_gradients(batch)

    def _jumps(self, nll: float) -> bool:
        """Returns whether the loss exceeds its running mean by more than the limit, and updates that mean."""
        mean, limit = self._running_nll, self.guards.max_loss_jump
        if limit is None:
            return False
        jumps = mean is not None and (nll - mean) / self.flow.features > limit
        # A jump counts as much as the limit: if the loss stays high, the mean rises and training goes on.
        capped = nll if mean is None else min(nll, mean + limit * self.flow.features)
        self._running_nll = capped if mean is None else self._DECAY * mean + (1 - self._DECAY) * capped
        return jumps

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the guards, as plain JSON types."""
        return {"steps": self.steps, "usual_nll": self._running_nll, "warming": self._warming}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that ``state_dict`` returned."""
        self.steps, self._running_nll, self._warming = state["steps"], state["usual_nll"], state["warming"]


def _of_all(loss: Tensor, nll: float, batch: int, exchange: Exchange) -> tuple[Tensor, float]:
    """Returns what each process minimises, so that the mean over processes is that over all samples; and that mean.

    Args:
        loss: the sum over this process's samples.
        nll: its value.
        batch: their number.
    """
    total, samples = exchange.total(nll, batch)
    return loss * (exchange.size / max(1.0, samples)), total / samples if samples else math.nan
