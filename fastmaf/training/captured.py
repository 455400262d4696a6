"""What a step of ``fastmaf.optim.FusedAdam`` leaves behind when it is captured in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels.adam.update import AdamNumbers, Update


class NotCapturableError(RuntimeError):
    """A step that cannot be captured in a CUDA graph; the message says why."""


class CapturedUpdates:
    """The updates of a step that was captured in a CUDA graph: which they are, and the scalars that replays read.

    While it is captured nothing is counted: ``FusedAdam.advance`` counts and sends the scalars before each replay.

    Args:
        device: of the parameters.
        most: how many updates there can be.
        state: of the optimiser, by parameter.
    """

    def __init__(self, device: torch.device, most: int, state: dict[Tensor, dict[str, Any]]) -> None:
        self.parameters: dict[Tensor, dict[str, Any]] = {}  # with their groups, in the order of their rows
        self._state = state
        self._rows: dict[Tensor, int] = {}
        self._moments: list[Tensor] = []  # for as long as replays write to them
        width = len(AdamNumbers(1, 1.0, 0.0, 0.0, 1.0, 0.0, False, False).kernel_scalars())
        self._host = torch.zeros(most, width, device="cpu", pin_memory=device.type == "cuda")
        self._device = torch.zeros(most, width, device=device)

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> Update:
        """Adds an update of a parameter of this group; its scalars are read on the device.

        Raises:
            NotCapturableError: the parameter has no state.
        """
        state = self._state.get(parameter)
        if not state:
            raise NotCapturableError("a parameter has no optimiser state yet: it makes that in its first step")
        moments = state["exp_avg"], state["exp_avg_sq"]
        self._moments += moments
        self.parameters[parameter] = group
        row = self._rows.setdefault(parameter, len(self._rows))
        return Update(*moments, AdamNumbers.of(1, group), self._device[row])

    def set(self, scalars: list[list[float]]) -> None:
        """Sends the scalars of the next replay. The one before must have been waited for: it may still be reading."""
        self._host[: len(scalars)] = torch.tensor(scalars, device="cpu")
        self._device.copy_(self._host, non_blocking=True)
