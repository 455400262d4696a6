"""Keeps the padding of packed weights zero, whoever writes to the weights.

Kernels multiply with whole tiles, so the padding must be zero when an op reads a weight. The gradients of fastmaf's
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
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels import native_library
from fastmaf.kernels.layout import padding, tiles_of

_NAME = "_fastmaf_padding"  # the attribute of a layout's table that holds what is known of its weight's padding
_PROBES = 4  # places that are read at every use
_PROBE_BYTES = 32  # at most, of each
_NATIVE = (torch.float32, torch.float64, torch.bfloat16)


class _Known:
    """The state of a weight in which its padding was zero.

    Attributes:
        version, address: of the weight.
        probes: memory within the padding, each with as many zero bytes. Valid as long as the address is.
        runs: where that memory lies: first number and count.
    """

    __slots__ = ("address", "probes", "runs", "version")

    def __init__(self, runs: Sequence[tuple[int, int]]) -> None:
        self.version, self.address = -1, 0
        self.probes: list[tuple[Any, bytes]] = []
        self.runs = runs

    def holds(self, weight: Tensor) -> bool:
        """Returns whether the padding of ``weight`` is still zero, as far as version, address and probes tell."""
        try:
            if weight._version != self.version or weight.data_ptr() != self.address:
                return False
        except RuntimeError:  # inference tensors have no version
            return False
        for probe, zeros in self.probes:  # noqa: SIM110 (a generator costs more than the comparisons)
            if probe.raw != zeros:
                return False
        return True

    def note(self, weight: Tensor) -> None:
        """Records the weight's present state."""
        if weight.is_inference():
            return
        address, size = weight.data_ptr(), weight.element_size()
        self.probes = []
        if weight.device.type == "cpu" and address:
            for first, count in self.runs:
                length = min(_PROBE_BYTES, count * size)
                self.probes.append(((ctypes.c_char * length).from_address(address + first * size), bytes(length)))
        self.version, self.address = weight._version, address

    # A copy belongs to another weight, of which nothing is known; addresses mean nothing in another process.
    def __deepcopy__(self, memo: object) -> _Known:
        return _Known(self.runs)

    def __reduce__(self) -> tuple[type[_Known], tuple[Sequence[tuple[int, int]]]]:
        return _Known, (self.runs,)


def keep_zero(weights: Sequence[Tensor], prefixes: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
    """Makes the padding of packed weights zero, in place, where it may have been written to.

    Neither autograd nor a version counter sees it: the padding takes no part in any function of the weights.

    Args:
        weights: packed, contiguous.
        prefixes: of each weight, int64, on its device.
        tables: ``PackedLayout.table`` of each, on the CPU.
    """
    stale: list[int] = []
    for i, (weight, table) in enumerate(zip(weights, tables, strict=True)):
        known: _Known | None = getattr(table, _NAME, None)
        if known is None or not known.holds(weight):
            stale.append(i)
    if stale:
        _zero([weights[i] for i in stale], [prefixes[i] for i in stale], [tables[i] for i in stale])


def without_padding(weight: Tensor, prefix: Tensor, table: Tensor) -> Tensor:
    """Returns a copy of ``weight`` whose padding is zero, differentiable: for weights that were computed, and whose
    memory may be needed by the backward pass of whatever computed them.
    """
    return weight.index_fill(0, padding(prefix, table), 0)


def _zero(weights: Sequence[Tensor], prefixes: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
    if all(weight.device.type == "cpu" and weight.dtype in _NATIVE for weight in weights) and _has_native():
        with torch.no_grad():
            torch.ops.fastmaf_native.zero_padding_(list(weights), list(prefixes), list(tables))
    else:
        for weight, prefix, table in zip(weights, prefixes, tables, strict=True):
            _zero_with_torch(weight, prefix, table)
    for weight, prefix, table in zip(weights, prefixes, tables, strict=True):
        if weight.is_meta:
            continue
        known: _Known | None = getattr(table, _NAME, None)
        if known is None:
            known = _Known(_places(prefix, table) if weight.device.type == "cpu" else [])
            setattr(table, _NAME, known)
        known.note(weight)


def _zero_with_torch(weight: Tensor, prefix: Tensor, table: Tensor) -> None:
    # In inference mode, and through .data, neither a leaf that requires gradients nor an inference tensor refuses, and
    # the weight's own version stays.
    with torch.inference_mode():
        packed = weight.data
        if weight.device.type != "cpu":
            packed.index_fill_(0, padding(prefix, table), 0)
            return
        for tile in tiles_of(table):
            rows = prefix[tile.row_start : tile.row_end, None]
            ragged = int(rows[0])  # up to here every row of the tile sees everything
            hidden = torch.arange(ragged, tile.width, device="cpu") >= rows
            tile.of(packed)[:, ragged:].masked_fill_(hidden, 0)


def _places(prefix: Tensor, table: Tensor) -> list[tuple[int, int]]:
    """Returns runs of padding, spread over a weight: first number and count of each."""
    runs = []
    for tile in tiles_of(table):
        sees = prefix[tile.row_start : tile.row_end]
        rows = (sees < tile.width).nonzero().flatten()
        rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _PROBES), device="cpu").long()]
        for row, first in zip(rows.tolist(), sees[rows].tolist(), strict=True):
            runs.append((tile.offset + row * tile.width + first, tile.width - first))
    return [runs[i] for i in torch.linspace(0, len(runs) - 1, min(len(runs), _PROBES), device="cpu").long().tolist()]


@functools.cache
def _has_native() -> bool:
    try:
        native_library.load()
    except ImportError:
        return False
    return True
