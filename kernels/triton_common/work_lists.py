"""What the work of a packed weight is cut into, and where its panels lie, as tensors that a GPU kernel reads.

Everything follows from a layout's panels, is made once per layout and stays on the device. Blocks are whole panels.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.tensor_cache import cached

# One program adds up so many columns without losing more digits than other float32 libraries do.
MOST_COLUMNS = 2048


class Work(NamedTuple):
    """What each program does, the longest first.

    Attributes:
        items: int32 ``[items, 5]`` or ``[items, 4]``; see ``forward`` and ``backward``.
        counts: int32, how many partial sums there are of each output unit (forward) or input unit (backward).
        slots: the largest of these.
    """

    items: Tensor
    counts: Tensor
    slots: int


def forward(panels: Tensor, device: torch.device, block_rows: int, block_columns: int, programs: int) -> Work:
    """Cuts the product with a weight into about ``programs`` items, or one per block of rows where these are more or
    ``programs`` is 0, of at most ``MOST_COLUMNS`` unless that is 0.

    An item is (block of rows, first column, end column, slot of its partial sum, columns of all panels before): the
    last is where the first panel of the block starts, in the item itself as a load of it would wait for another.
    """

    def make() -> Work:
        ends, befores = _ends(panels, block_rows), panels[:: block_rows // PANEL].tolist()
        segment = _segment(sum(-(-end // block_columns) for end in ends), len(ends), programs) * block_columns
        segment = min(segment, MOST_COLUMNS) if programs else segment
        items, counts = [], torch.zeros(len(ends) * block_rows, dtype=torch.int32, device="cpu")
        for block, end in enumerate(ends):
            starts = range(0, max(end, 1), segment)
            items += [
                (block, start, min(start + segment, end), slot, befores[block]) for slot, start in enumerate(starts)
            ]
            counts[block * block_rows : (block + 1) * block_rows] = len(starts)
        return _work(items, [end - start for _, start, end, *_ in items], counts, device)

    return cached(panels, ("forward", device, block_rows, block_columns, programs), make)


def backward(
    panels: Tensor,
    device: torch.device,
    in_features: int,
    block_rows: int,
    block_columns: int,
    programs: int,
    bias_rows: int = 0,
) -> Work:
    """Cuts a weight into chunks of columns, about ``programs`` of them, or one per chunk of columns where these are
    more.

    An item is (first column, first block of rows, end block, slot of its partial sum over rows). With ``bias_rows``,
    items of so many numbers of the bias come last: (a negative column, first row, end row, 0).
    """

    def make() -> Work:
        ends = _ends(panels, block_rows)
        chunks = range(0, in_features, block_columns)
        firsts = [next((b for b, end in enumerate(ends) if end > c), len(ends)) for c in chunks]
        segment = _segment(sum(len(ends) - first for first in firsts), len(chunks), programs)
        items, counts = [], torch.zeros(in_features, dtype=torch.int32, device="cpu")
        for column, first in zip(chunks, firsts, strict=True):
            starts = range(first, max(len(ends), first + 1), segment)
            items += [(column, start, min(start + segment, len(ends)), slot) for slot, start in enumerate(starts)]
            counts[column : column + block_columns] = len(starts)
        costs = [end - start for _, start, end, _ in items]
        rows = len(ends) * block_rows
        of_bias = [(-block_columns, row, min(row + bias_rows, rows), 0) for row in range(0, rows, bias_rows or rows)]
        if bias_rows:
            items, costs = items + of_bias, costs + [0] * len(of_bias)
        return _work(items, costs, counts, device)

    return cached(panels, ("backward", device, in_features, block_rows, block_columns, programs, bias_rows), make)


def _ends(panels: Tensor, block_rows: int) -> list[int]:
    """Returns how many columns each block of panels has: those of its last panel, as widths do not decrease."""
    if block_rows % PANEL:
        raise ValueError(f"blocks of rows must be whole panels of {PANEL}; found {block_rows}")
    widths, step = panels.diff().tolist(), block_rows // PANEL
    return [widths[min(start + step, len(widths)) - 1] for start in range(0, len(widths), step)]


def _segment(steps: int, items: int, programs: int) -> int:
    """Returns how many steps one item may take, so that there are about ``programs`` items."""
    return max(1, steps) if items >= programs else max(1, -(-steps // programs))


def _work(items: Sequence[tuple[int, ...]], costs: list[int], counts: Tensor, device: torch.device) -> Work:
    # The hardware starts programs in order: the longest first leaves the least waiting at the end.
    order = sorted(range(len(items)), key=lambda i: -costs[i])
    table = torch.tensor([items[i] for i in order], dtype=torch.int32, device="cpu")
    return Work(table.to(device), counts.to(device), int(counts.max()))


def numbers(owner: Tensor, rows: Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Returns rows of numbers, int64 or float32, on the device, where they stay for as long as ``owner`` exists.

    Sent once, as sending waits for the device and cannot be part of a CUDA graph. A recorded graph reads them for as
    long as it is replayed, so that none may be dropped for others.
    """
    key = tuple(map(tuple, rows))

    def make() -> Tensor:
        dtype = torch.int64 if isinstance(rows[0][0], int) else torch.float32
        return torch.tensor(rows, dtype=dtype, device="cpu").to(device)

    return cached(owner, ("numbers", device, key), make)


def bits_of(number: float) -> int:
    """Returns the bits of a float32 number, for rows of int64."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])


def on_device(owner: Tensor, device: torch.device) -> Tensor:
    """Returns a layout's panels or a block's schedule on the device.

    Always a copy: a cache that held its own key would never let go of it.
    """
    return cached(owner, ("copy", device), lambda: owner.to(device, copy=True))
