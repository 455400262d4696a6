"""Adam's state and step counters, as ``FusedAdam`` updates them parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastmaf.kernels import empty_on_huge_pages
from fastmaf.kernels.adam.update import AdamNumbers, Update

# torch would convert a Python number to a tensor for each counter.
ONE = torch.ones((), dtype=torch.float32, device="cpu")


class ReplayedSteps:
    """Steps that replays of a CUDA graph took: it increments the counters itself, which their versions do not show.

    Attributes:
        counters: the counters, by parameter.
        taken: how many steps.
    """

    def __init__(self, counters: Mapping[Tensor, Tensor]) -> None:
        self.counters, self.taken = counters, 0


class StepCounts:
    """Reads and increments the counters in ``state["step"]``, on any device, without waiting for a GPU.

    A counter on a GPU is read once; from then on its value is known on the host until other code writes to it.

    Attributes:
        replayed: steps that are not yet added to the known values; counting them takes one addition for all parameters.
    """

    def __init__(self) -> None:
        self._known: dict[Tensor, tuple[Tensor, int, int]] = {}  # counter, its version and its value, by parameter
        self.replayed: ReplayedSteps | None = None

    def begin_replays(self, counters: Mapping[Tensor, Tensor]) -> ReplayedSteps:
        """Returns the steps that replays of one graph take from now on."""
        self._settle()
        self.replayed = ReplayedSteps(counters)
        return self.replayed

    def _settle(self) -> None:
        replayed, self.replayed = self.replayed, None
        if replayed is None or not replayed.taken:
            return
        for parameter, counter in replayed.counters.items():
            known = self._known.get(parameter)
            if known is not None and known[0] is counter:
                self._known[parameter] = *known[:2], known[2] + replayed.taken

    def of(self, parameter: Tensor, counter: Tensor) -> int:
        """Returns the value of a parameter's counter."""
        if self.replayed is not None and self.replayed.taken:
            self._settle()
        if counter.is_cpu:
            return int(counter)
        known = self._known.get(parameter)
        if known is None or known[0] is not counter or known[1] != counter._version:
            known = self._known[parameter] = counter, counter._version, int(counter)
        return known[2]

    @torch.no_grad()
    def increment(self, counters: Mapping[Tensor, Tensor]) -> None:
        """Adds one to the counters of some parameters."""
        on_cpu = [counter for counter in counters.values() if counter.is_cpu]
        on_gpu = {parameter: counter for parameter, counter in counters.items() if not counter.is_cpu}
        values = [self.of(*entry) for entry in on_gpu.items()]
        if on_cpu:
            torch._foreach_add_(on_cpu, [ONE] * len(on_cpu))
        if on_gpu:
            torch._foreach_add_(list(on_gpu.values()), 1)
        for (parameter, counter), value in zip(on_gpu.items(), values, strict=True):
            self._known[parameter] = counter, counter._version, value + 1


BeginUpdate: TypeAlias = Callable[[Tensor, dict[str, Any]], Update]
"""Begins the one update of a parameter of a group in a step; returns its moments and scalars."""


class EagerUpdates:
    """Updates that are executed at once, and counted together when all are begun.

    Attributes:
        counters: the step counters of the parameters whose updates were begun.

    Args:
        state: of the parameters.
        counts: of their steps.
        part: returns of how many numbers of a parameter this process has the moments; None: of all.
    """

    def __init__(
        self, state: dict[Tensor, dict[str, Any]], counts: StepCounts, part: Callable[[Tensor], int] | None = None
    ) -> None:
        self.counters: dict[Tensor, Tensor] = {}
        self._state, self._counts, self._part = state, counts, part
        self._numbers: dict[tuple[int, int], AdamNumbers] = {}  # most parameters share a group and a step

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> Update:
        """Begins an update; creates the state of a parameter that has none."""
        state = self._state[parameter]
        if not state:
            shape = parameter.shape if self._part is None else torch.Size([self._part(parameter)])
            state.update(_initial_state(parameter, group, shape))
        counter = self.counters[parameter] = state["step"]
        key = id(group), self._counts.of(parameter, counter) + 1
        if key not in self._numbers:
            self._numbers[key] = AdamNumbers.of(key[1], group)
        torch.autograd.graph.increment_version(parameter)  # autograd then refuses graphs that need the old values
        return Update(state["exp_avg"], state["exp_avg_sq"], self._numbers[key])

    def count(self) -> None:
        """Counts the updates that were begun."""
        self._counts.increment(self.counters)


def _initial_state(parameter: Tensor, group: dict[str, Any], shape: torch.Size) -> dict[str, Tensor]:
    """Returns the initial state of ``torch.optim.Adam``, with moments of some shape."""
    on_device = group["fused"] or group["capturable"]
    dtype = torch.float32 if on_device or torch.get_default_dtype() != torch.float64 else torch.float64
    state = {"step": torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")}
    for name in ("exp_avg", "exp_avg_sq"):
        memory = empty_on_huge_pages(shape.numel(), device=parameter.device, dtype=parameter.dtype)
        state[name] = memory.zero_().view(shape)
    return state


def check_moments(state_dict: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
    """Raises ValueError unless the moments in the ``state_dict`` of an optimiser have the shapes of the parameters."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    for number, parameter in zip(saved, parameters, strict=False):  # torch checks how many there are
        for name, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"{name} of parameter {number}: expected shape {tuple(parameter.shape)}; found "
                    f"{tuple(value.shape)}: the state is of another model, or of a version of fastmaf that packed "
                    "weights otherwise; begin with a new optimiser"
                )
