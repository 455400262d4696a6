"""How many steps each parameter of an optimiser has taken, known on the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# On the CPU torch wraps a number in a tensor for each counter, its op on lists of them included.
_ONE = torch.ones((), dtype=torch.float32, device="cpu")


class StepCounts:
    """Reads and raises the counters in ``state["step"]``, wherever torch keeps them, without waiting for a device.

    A counter on a device is read once; after that its value is known here until somebody else writes to it.
    """

    def __init__(self) -> None:
        self._known: dict[Tensor, tuple[Tensor, int, int]] = {}  # the counter, its version and its value

    def of(self, parameter: Tensor, counter: Tensor) -> int:
        """Returns the value of a parameter's counter."""
        if counter.device.type == "cpu":
            return int(counter)
        known = self._known.get(parameter)
        if known is None or known[0] is not counter or known[1] != counter._version:
            known = self._known[parameter] = counter, counter._version, int(counter)
        return known[2]

    def add_one(self, counters: Mapping[Tensor, Tensor]) -> None:
        """Raises the counters of some parameters by one."""
        on_device = {}
        for parameter, counter in counters.items():
            if counter.device.type == "cpu":
                counter.add_(_ONE)
            else:
                on_device[parameter] = counter, self.of(parameter, counter)
        if on_device:
            torch._foreach_add_([counter for counter, _ in on_device.values()], 1)
        for parameter, (counter, value) in on_device.items():
            self._known[parameter] = counter, counter._version, value + 1
