"""The updates of a captured training step, and what its replays need from the host."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels.adam.op import adam_step_
from fastmaf.kernels.adam.update import AdamNumbers, Update
from fastmaf.training.adam_updates import ONE, ReplayedSteps
from fastmaf.training.fused_adam import FusedAdam
from fastmaf.training.gradient_sink import Gradients, has_hooks

_version = attrgetter("_version")


class NotCapturableError(RuntimeError):
    """A training step cannot be captured in a CUDA graph; the message says why."""


class CapturedUpdates:
    """The updates of a captured step of ``FusedAdam``, and the scalars that its replays read on the device.

    Capturing counts no steps. Each replay needs scalars, which ``prepare`` sends, and is noted by ``replayed``.
    Methods that capture raise NotCapturableError for a parameter without state, which its first step creates.

    Args:
        optimizer: the optimiser of the parameters.

    Attributes:
        rows: the rows of the parameters in the table of scalars.
    """

    def __init__(self, optimizer: FusedAdam) -> None:
        self.rows: dict[Tensor, int] = {}
        self._optimizer, self._groups = optimizer, optimizer._groups()
        self._tensors: list[Tensor] = []  # held, as replays write to them
        self._counters: dict[Tensor, Tensor] = {}
        self._versions: list[int] = []  # of the counters
        self._steps: ReplayedSteps | None = None
        self._sent: tuple[float, list[AdamNumbers]] | None = None
        device = next(iter(self._groups)).device
        shape = len(self._groups), len(AdamNumbers.of(1, optimizer.param_groups[0]).kernel_scalars())
        # Two, as one may not have been sent yet when the scalars of the next step are known.
        hosts = [torch.zeros(shape, device="cpu", pin_memory=device.type == "cuda") for _ in range(2)]
        self._hosts = [(host, host.numpy()) for host in hosts]
        self._device = torch.zeros(shape, device=device)

    def minimize(self, loss: Tensor) -> None:
        """Captures ``FusedAdam.minimize``.

        Raises:
            NotCapturableError: the gradient of a parameter must be stored.
        """
        self._optimizer._update_in_backward(loss, self._begin, self._groups)
        self._count()
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
        self._count()

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> Update:
        state = self._optimizer.state.get(parameter)
        if not state:
            raise NotCapturableError("a parameter has no optimiser state, which its first step creates")
        moments = state["exp_avg"], state["exp_avg_sq"]
        self._counters[parameter] = state["step"]
        self._tensors += *moments, state["step"]
        row = self.rows.setdefault(parameter, len(self.rows))
        return Update(*moments, AdamNumbers.of(1, group), self._device[row])

    @torch.no_grad()
    def _count(self) -> None:
        """Captures the increments of the counters that lie on the device."""
        on_device = [counter for counter in self._counters.values() if counter.device == self._device.device]
        self._on_host = [counter for counter in self._counters.values() if counter.device != self._device.device]
        if on_device:
            torch._foreach_add_(on_device, 1)

    def prepare(self) -> None:
        """Finds out which step is next, and sends its scalars."""
        counts, versions = self._optimizer._counts, list(map(_version, self._counters.values()))
        if self._steps is None or self._steps is not counts.replayed or versions != self._versions:
            self._steps = counts.begin_replays(self._counters)
            rows: dict[tuple[int, int], list[int]] = {}  # most parameters share a group and a step
            for parameter, counter in self._counters.items():
                key = id(self._groups[parameter]), counts.of(parameter, counter)
                rows.setdefault(key, []).append(self.rows[parameter])
            groups = {id(group): group for group in self._groups.values()}
            self._parts = [(of, groups[group], count) for (group, count), of in rows.items()]
            self._versions, self._sent = versions, None
        self.send(1.0)

    def send(self, scale: float) -> None:
        """Sends the scalars of the prepared step to the device, for gradients times ``scale``, unless it has them.

        Before every second call a result of the device must have been read, so that its buffer was sent.
        """
        assert self._steps is not None
        next_step = self._steps.taken + 1
        scalars = scale, [AdamNumbers.of(count + next_step, group) for _, group, count in self._parts]
        if scalars == self._sent:
            return
        self._sent = scalars
        self._hosts.reverse()
        host, table = self._hosts[0]
        for (rows, _, _), numbers in zip(self._parts, scalars[1], strict=True):
            table[rows if len(self._parts) > 1 else slice(None)] = numbers.kernel_scalars(scale)
        self._device.copy_(host, non_blocking=True)

    def replayed(self) -> None:
        """Notes that a replay took a step."""
        assert self._steps is not None
        self._steps.taken += 1
        if self._on_host:
            torch._foreach_add_(self._on_host, [ONE] * len(self._on_host))
            self._versions = list(map(_version, self._counters.values()))
