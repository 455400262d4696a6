"""Keeps the padding of packed weights zero, whoever writes to the weights.

Kernels multiply with whole panels, so the padding must be zero when an op reads a weight. The gradients of fastmaf's
ops are zero there, but anything else may write to a parameter: an initialiser, an optimiser that adds noise, an average
of weights. Each op therefore calls ``keep_zero`` first, which

- compares the weight's version counter and address with those at which its padding was last known to be zero, and
- reads some numbers of the padding, since writes through ``weight.data`` change neither.

Where one of them differs, all of the padding is read, and set to zero where it is not: a small part of what the op
reads anyway. On a GPU nothing is read, as that would wait for the device: after a change of version or address the
padding is set to zero whatever it holds. Writes through ``weight.data`` go unnoticed there until the version changes.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels import storage
from fastmaf.kernels.layout import PANEL, padding, zero_padding
from fastmaf.kernels.tensor_cache import cached

_version, _dtype, _value = map(operator.attrgetter, ("_version", "dtype", "value"))
_INTEGERS = {ctypes.sizeof(kind): kind for kind in (ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64)}


class _Known(NamedTuple):
    """A state of some weights in which their padding was zero; never written to, as other threads may read it.

    Attributes:
        versions, addresses, dtypes: of the weights.
        probes: some numbers of the padding, as integers, valid for weights at these addresses of these dtypes.
    """

    versions: list[int]
    addresses: list[int]
    dtypes: list[torch.dtype]
    probes: list[Any]

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Returns whether the padding is still zero, as far as versions, addresses and probes tell."""
        return (  # by maps and not in a loop: a small flow is called often
            list(map(Tensor.data_ptr, weights)) == self.addresses
            and list(map(_dtype, weights)) == self.dtypes
            and not self.is_written(weights)
        )

    def is_written(self, weights: Sequence[Tensor]) -> bool:
        """Returns whether weights of these addresses and dtypes may have been written to since."""
        try:
            return list(map(_version, weights)) != self.versions or any(map(_value, self.probes))
        except RuntimeError:  # inference tensors have no version
            return True

    def updated(self, weights: Sequence[Tensor], prefixes: Sequence[Tensor], panels: Sequence[Tensor]) -> _Known:
        """Returns the present state of the weights; this one where it cannot be told."""
        if any(weight.is_inference() for weight in weights):
            return self
        versions, addresses = [weight._version for weight in weights], [weight.data_ptr() for weight in weights]
        dtypes = [weight.dtype for weight in weights]
        if addresses == self.addresses and dtypes == self.dtypes:
            return self._replace(versions=versions)
        probes: list[Any] = []
        for weight, *layout in zip(weights, prefixes, panels, strict=True):
            size = weight.element_size()
            addresses_of_probes = (weight.data_ptr() + place * size for place in _places(weight, *layout))
            probes += map(_INTEGERS[size].from_address, addresses_of_probes)
        return _Known(versions, addresses, dtypes, probes)


def keep_zero(weights: Sequence[Tensor], prefixes: Sequence[Tensor], panels: Sequence[Tensor]) -> None:
    """Makes the padding of packed weights zero, in place, where it may have been written to.

    Neither autograd nor a version counter sees it: the padding takes no part in any function of the weights.

    Args:
        weights: packed, contiguous, at least one.
        prefixes: of each weight, int64, on its device.
        panels: ``PackedLayout.panels`` of each, on the CPU.
    """
    known = cached(panels[0], ("known padding", len(weights)), lambda: [_Known([], [], [], [])])
    state = known[0]
    if not state.holds(weights):
        _zero(weights, prefixes, panels)
        known[0] = state.updated(weights, prefixes, panels)


class PaddingInPlace:
    """``keep_zero`` of weights on the CPU that stay the same tensors in the same memory, which then is not looked at.

    Args:
        weights, prefixes, panels: as of ``keep_zero``; it needs the native library.
    """

    def __init__(self, weights: Sequence[Tensor], prefixes: Sequence[Tensor], panels: Sequence[Tensor]) -> None:
        self._weights = weights
        self._paddings = storage.Paddings(weights, prefixes, panels)
        self._paddings.zero()
        self._known = _Known([], [], [], []).updated(weights, prefixes, panels)

    def keep_zero(self) -> None:
        """Makes the padding zero where it may have been written to."""
        if self._known.is_written(self._weights):
            if not any(weight.is_inference() for weight in self._weights):
                self._known = self._known._replace(versions=list(map(_version, self._weights)))
            self._paddings.zero()


def without_padding(weight: Tensor, prefix: Tensor, panels: Tensor) -> Tensor:
    """Returns a copy of ``weight`` whose padding is zero, differentiable: for weights that were computed, and whose
    memory may be needed by the backward pass of whatever computed them.
    """
    return weight.index_fill(0, padding(prefix, panels), 0)


def _zero(weights: Sequence[Tensor], prefixes: Sequence[Tensor], panels: Sequence[Tensor]) -> None:
    if all(weight.device.type == "cpu" for weight in weights):
        storage.zero_padding(weights, prefixes, panels)
        return
    # In inference mode, and through .data, neither a leaf that requires gradients nor an inference tensor refuses, and
    # the weight's own version stays.
    with torch.inference_mode():
        for weight, *layout in zip(weights, prefixes, panels, strict=True):
            zero_padding(weight.data, *layout)


def _places(weight: Tensor, prefix: Tensor, panels: Tensor) -> list[int]:
    """Returns where to probe the padding: a number of the first row that has some, and one of the last."""
    if weight.device.type != "cpu" or not weight.data_ptr():
        return []

    def find() -> list[int]:
        sees = prefix.new_zeros(PANEL * (len(panels) - 1))
        sees[: len(prefix)] = prefix
        rows = (sees < panels.diff().repeat_interleave(PANEL)).nonzero().flatten().tolist()
        columns = [int(panels[row // PANEL] + sees[row]) for row in (*rows[:1], *rows[-1:])]
        return [PANEL * column + row % PANEL for column, row in zip(columns, (*rows[:1], *rows[-1:]), strict=True)]

    return cached(panels, "probed padding", find)
