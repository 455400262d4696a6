"""Training steps of ``FusedAdam`` as CUDA graphs."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from fastmaf.flows import Flow
from fastmaf.kernels.adam.op import adam_step_, compile_adam
from fastmaf.kernels.adam.update import AdamNumbers, Update
from fastmaf.nn import zero_padding_
from fastmaf.training.cuda_graphs import GraphCache, Key, graph_key, record
from fastmaf.training.fused_adam import FusedAdam
from fastmaf.training.gradient_sink import Gradients, has_hooks
from fastmaf.training.guards import clip_scale


class NotCapturableError(RuntimeError):
    """A training step cannot be captured in a CUDA graph; the message says why."""


class CapturedUpdates:
    """The updates of a captured step of ``FusedAdam``, and the scalars that its replays read on the device.

    Capturing counts no steps: ``advance`` counts one and sends its scalars before each replay. Methods that capture
    raise NotCapturableError for a parameter without state, which its first step creates.

    Args:
        optimizer: the optimiser of the parameters.

    Attributes:
        rows: the rows of the parameters in the table of scalars.
    """

    def __init__(self, optimizer: FusedAdam) -> None:
        self.rows: dict[Tensor, int] = {}
        self._optimizer, self._groups = optimizer, optimizer._groups()
        self._moments: list[Tensor] = []  # held, as replays write to them
        device = next(iter(self._groups)).device
        shape = len(self._groups), len(AdamNumbers.of(1, optimizer.param_groups[0]).kernel_scalars())
        self._host = torch.zeros(shape, device="cpu", pin_memory=device.type == "cuda")
        self._device = torch.zeros(shape, device=device)

    def minimize(self, loss: Tensor) -> None:
        """Captures ``FusedAdam.minimize``.

        Raises:
            NotCapturableError: the gradient of a parameter must be stored.
        """
        self._optimizer._update_in_backward(loss, self._begin, self._groups)
        if any(parameter.grad is not None for parameter in self._groups):
            self._optimizer.zero_grad()
            raise NotCapturableError("a parameter that is not of the flow's blocks, or that has hooks, got a gradient")

    def gradients(self, loss: Tensor) -> Gradients:
        """Captures a backward pass and returns the gradients, for ``step``; nothing is left in ``grad``.

        Raises:
            NotCapturableError: a parameter has hooks, which a replay would not call, or a group has ``amsgrad``.
        """
        gradients, groups = self._optimizer._gradients(loss, self._groups), self._groups
        self._optimizer.zero_grad()
        if any(has_hooks(p) or groups[p]["amsgrad"] or groups[p]["differentiable"] for p in gradients.stored):
            raise NotCapturableError("a parameter has hooks, or its group amsgrad or differentiable")
        return gradients

    @torch.no_grad()
    def step(self, gradients: Gradients) -> None:
        """Captures a step with the result of ``gradients``.

        Raises:
            NotCapturableError: a parameter does not have the memory layout that the kernel needs.
        """
        self._optimizer._apply_factored(gradients, self._begin, self._groups)
        for parameter, grad in gradients.stored.items():
            # torch's own step refuses to be captured; the kernel that reads its scalars on the device does not.
            if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                raise NotCapturableError("a parameter with a gradient in grad is not contiguous float32")
            adam_step_(parameter, grad, self._begin(parameter, self._groups[parameter]))

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> Update:
        state = self._optimizer.state.get(parameter)
        if not state:
            raise NotCapturableError("a parameter has no optimiser state, which its first step creates")
        moments = state["exp_avg"], state["exp_avg_sq"]
        self._moments += moments
        row = self.rows.setdefault(parameter, len(self.rows))
        return Update(*moments, AdamNumbers.of(1, group), self._device[row])

    def advance(self, scale: float = 1.0) -> None:
        """Counts a step of all parameters and sends its scalars to the device, for gradients times ``scale``.

        The previous replay must have ended: it may still read the scalars.
        """
        counts = self._optimizer._counts
        counters = {parameter: self._optimizer.state[parameter]["step"] for parameter in self.rows}
        known: dict[tuple[int, int], list[float]] = {}  # most parameters share a group and a step
        scalars = []
        for parameter, counter in counters.items():
            group = self._groups[parameter]
            key = id(group), counts.of(parameter, counter) + 1
            if key not in known:
                known[key] = AdamNumbers.of(key[1], group).kernel_scalars(scale)
            scalars.append(known[key])
        counts.increment(counters)
        with torch.no_grad():
            self._host[: len(scalars)] = torch.tensor(scalars, device="cpu")
            self._device.copy_(self._host, non_blocking=True)


class GraphedStep:
    """A training step on the mean NLL of a batch as CUDA graphs: the forward pass, and ``FusedAdam.minimize``.

    They are two graphs, so that the loss can be checked before anything is changed. With ``max_norm`` the second is
    two again: the norm of the gradients is checked before the step.

    Args:
        flow: the model; every parameter has taken a step.
        optimizer: over its parameters.
        x: ``[N, D]``, a batch of the shape to be replayed.
        max_norm: the gradients are scaled down to this common norm; None for no limit.

    Raises:
        NotCapturableError: see ``CapturedUpdates``.
    """

    _loss: Tensor

    def __init__(self, flow: Flow, optimizer: FusedAdam, x: Tensor, max_norm: float | None = None) -> None:
        self._flow, self._optimizer, self._x, self._max_norm = flow, optimizer, x.clone(), max_norm
        self._layers = flow._layers()
        self._updates = CapturedUpdates(optimizer)
        if max_norm is not None:
            compile_adam(x.device)
        self._forward = record(self._run_forward, x.device)
        pool = self._forward.pool()
        self._backward = None if max_norm is None else record(self._run_backward, x.device, pool)
        self._step = record(self._run_step, x.device, pool)
        self._loss = self._loss.detach()  # no other backward pass follows

    def _run_forward(self) -> None:
        self._loss = -self._flow.log_prob(self._x).mean()

    def _run_backward(self) -> None:
        self._gradients = self._updates.gradients(self._loss)
        self._squared_norm = self._gradients.squared_norm()

    def _run_step(self) -> None:
        if self._backward is None:
            self._updates.minimize(self._loss)
        else:
            self._updates.step(self._gradients)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mean NLL of ``x`` in nats."""
        zero_padding_(self._layers)  # which ops do on every call, but a replay does not
        self._x.copy_(x)
        self._forward.replay()
        return self._loss.detach()

    def minimize(self) -> bool:
        """Takes a step on the loss of the last ``forward``, whose value must have been read.

        Returns:
            Whether the step was taken: not where the norm of the gradients is to be limited and is not finite.
        """
        scale = 1.0
        if self._backward is not None and self._max_norm is not None:
            self._backward.replay()
            norm = math.sqrt(float(self._squared_norm))
            if not math.isfinite(norm):
                return False
            scale = clip_scale(norm, self._max_norm)
        self._updates.advance(scale)
        self._step.replay()
        torch.autograd.graph.increment_version(list(self._updates.rows))  # autograd does not see the replay
        return True


class GraphedSteps:
    """The graphs of training steps by batch shape; see ``GraphedStep``."""

    def __init__(self, flow: Flow, optimizer: FusedAdam, max_norm: float | None = None) -> None:
        self._flow, self._optimizer, self._max_norm = flow, optimizer, max_norm
        self._cache: GraphCache[GraphedStep] = GraphCache()
        self._refused = False

    def get(self, x: Tensor) -> GraphedStep | None:
        """Returns the graphs for batches like ``x``, or None where the step has to be taken eagerly.

        Warns:
            UserWarning: once, where such steps cannot be captured.
        """
        if (key := self._key(x)) is None:
            return None
        try:
            return self._cache.get(key, lambda: GraphedStep(self._flow, self._optimizer, x, self._max_norm))
        except NotCapturableError as error:
            self._refused = True
            warnings.warn(f"training steps are not replayed as CUDA graphs: {error}", stacklevel=3)
            return None

    def ran_eagerly(self, x: Tensor) -> None:
        """Notes that a step on a batch like ``x`` was taken eagerly, so that the next one can be captured."""
        if (key := self._key(x)) is not None:
            self._cache.ran_eagerly(key)

    def _key(self, x: Tensor) -> Key | None:
        """Returns the key of the flow and of the step: how parameters are updated, and where the moments are.

        None where nothing can be replayed: a replay calls no hooks.
        """
        if self._refused or self._optimizer.has_step_hooks() or (key := graph_key(self._flow, x)) is None:
            return None
        modes = [group[name] for group in self._optimizer.param_groups for name in ("amsgrad", "differentiable")]
        states = [state for state in self._optimizer.state.values() if state]
        return *key, *modes, *(state[name].data_ptr() for state in states for name in ("exp_avg", "exp_avg_sq"))
