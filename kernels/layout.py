"""Packed staircase storage: the only description of a MADE mask that a kernel needs.

With the units of every layer sorted by degree, unit ``j`` sees exactly the first ``prefix[j]`` units of the layer
before it, and ``prefix`` does not decrease. The visible weights form a staircase. They are kept in row tiles, each
tile as wide as its last row sees (rounded up), one after another in a single 1-D tensor:

    tile t holds rows row_start..row_end, columns 0..width, row-major from offset.

Numbers inside a tile but beyond its row's prefix are padding. Padding is always zero, so that no forward pass needs a
mask: every gradient is zero there, and ``padding.py`` undoes the writes of others. Whole tiles are therefore plain
dense matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.tensor_cache import cached, is_cached

# Columns are rounded up to this many numbers: one 64-byte cache line or vector register of float32.
ALIGNMENT = 16
# A sixteenth of the layer's width per step wastes about 1/16 of the visible weights; more tiles cost more launches
# than they save bytes (measured at 512 x 12,288 and 24,576 x 512 on a CPU, batches 1 to 64).
MAX_STEPS = 16
# A tile smaller than this is all call overhead: small layers get fewer steps, tiny ones a single tile.
MIN_TILE_NUMEL = 32_768
# No tile is taller, so that one tile's output stays small whatever the degrees are.
MAX_TILE_ROWS = 4_096


class Tile(NamedTuple):
    """Rows ``row_start..row_end`` and columns ``0..width`` of a masked weight, row-major from ``offset`` on."""

    row_start: int
    row_end: int
    width: int
    offset: int

    def of(self, packed: Tensor) -> Tensor:
        """Returns this tile as a matrix ``[row_end - row_start, width]`` that shares the memory of ``packed``, which
        need not be contiguous.
        """
        step = packed.stride(0)
        return packed.as_strided(
            (self.row_end - self.row_start, self.width),
            (self.width * step, step),
            packed.storage_offset() + self.offset * step,
        )


def tiles_of(table: Tensor) -> list[Tile]:
    """Returns the tiles of a table ``[T, 4]``: the form in which an op receives them.

    A tensor and not a list of integers: torch walks through every argument of a custom op several times, number by
    number.
    """
    return [Tile(*row) for row in table.tolist()]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class PackedLayout:
    """Where each visible weight of one masked layer lies in its packed 1-D storage.

    Args:
        prefix: ``[out_features]`` integers, non-decreasing, in ``0..in_features``: how many inputs each output sees.
        in_features: width of the dense weight.
        group: tiles start and end at multiples of this many rows (2 keeps a dimension's shift and log-scale together).

    Attributes:
        tiles: the tiles, top to bottom, covering every row; rows that see nothing lie in tiles of width 0.
        table: the same as an int32 tensor ``[T, 4]``, for the ops; on the CPU wherever the weights are.
        numel: stored numbers, padding included.
        visible: weights that the mask lets through.
    """

    def __init__(self, prefix: Tensor, in_features: int, *, group: int = 1) -> None:
        prefix = prefix.detach().to("cpu", torch.int64).contiguous()
        if prefix.dim() != 1 or prefix.numel() == 0:
            raise ValueError(
                f"prefix must be a non-empty 1-D tensor, one entry per output; found shape {tuple(prefix.shape)}"
            )
        if bool((prefix[1:] < prefix[:-1]).any()):
            raise ValueError(
                "prefix must not decrease: sort the output units by degree first (a relabelling: the function is "
                "unchanged)"
            )
        if int(prefix[0]) < 0 or int(prefix[-1]) > in_features:
            raise ValueError(
                f"prefix must lie in 0..in_features={in_features}; found {int(prefix[0])}..{int(prefix[-1])}"
            )
        if prefix.numel() % group:
            raise ValueError(f"{prefix.numel()} rows cannot be tiled in groups of {group}")
        self.prefix = prefix
        self.in_features = in_features
        self.out_features = prefix.numel()
        self.visible = int(prefix.sum())
        self.tiles = self._cut(group)
        self.table = torch.tensor(self.tiles, dtype=torch.int32, device="cpu")
        last = self.tiles[-1]
        self.numel = last.offset + (last.row_end - last.row_start) * last.width

    def _cut(self, group: int) -> list[Tile]:
        steps = min(MAX_STEPS, max(1, self.visible // MIN_TILE_NUMEL))
        quantum = _round_up(-(-self.in_features // steps), ALIGNMENT)
        # A tile is a run of rows whose prefix rounds up to the same multiple of the quantum.
        step_of_row = (self.prefix[group - 1 :: group] + quantum - 1) // quantum
        _, runs = torch.unique_consecutive(step_of_row, return_counts=True)
        tiles, row, offset = [], 0, 0
        max_rows = MAX_TILE_ROWS // group * group
        for run in runs.tolist():
            run_end = row + run * group
            while row < run_end:
                end = min(run_end, row + max_rows)
                width = min(self.in_features, _round_up(int(self.prefix[end - 1]), ALIGNMENT))
                tiles.append(Tile(row, end, width, offset))
                offset += (end - row) * width
                row = end
        return tiles

    def check_storage(self, packed: Tensor) -> None:
        """Raises ValueError unless ``packed`` is a 1-D tensor of ``numel`` entries."""
        if packed.shape != (self.numel,):
            raise ValueError(
                f"packed weight must have shape ({self.numel},) for this layout; found {tuple(packed.shape)}"
            )

    def pack(self, dense: Tensor) -> Tensor:
        """Packs a dense weight ``[out_features, in_features]``; what the mask hides is dropped, whatever it holds."""
        if dense.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"dense weight must have shape {(self.out_features, self.in_features)}; found {tuple(dense.shape)}"
            )
        packed = dense.new_empty(self.numel)
        for tile in self.tiles:
            tile.of(packed).copy_(dense[tile.row_start : tile.row_end, : tile.width])
        return self.zero_padding_(packed)

    def unpack(self, packed: Tensor) -> Tensor:
        """Returns the dense weight ``[out_features, in_features]``, zero where the mask hides.

        For export and inspection only.
        """
        self.check_storage(packed)
        dense = packed.new_zeros(self.out_features, self.in_features)
        for tile in self.tiles:
            dense[tile.row_start : tile.row_end, : tile.width] = tile.of(packed)
        return dense.masked_fill_(~self.mask().to(dense.device), 0)

    def mask(self) -> Tensor:
        """Returns the dense boolean mask ``[out_features, in_features]``. For export and inspection only."""
        return torch.arange(self.in_features, device="cpu") < self.prefix[:, None]

    def zero_padding_(self, packed: Tensor) -> Tensor:
        """Writes zero to the padding of ``packed``, in place, and returns it."""
        self.check_storage(packed)
        return packed.index_fill_(0, self._padding.to(packed.device), 0)

    def padding_is_zero(self, packed: Tensor) -> bool:
        """Returns whether every number of the padding is exactly zero."""
        self.check_storage(packed)
        return not bool(packed[self._padding.to(packed.device)].count_nonzero())

    @property
    def _padding(self) -> Tensor:
        return padding(self.prefix, self.table)

    def __repr__(self) -> str:
        return (
            f"PackedLayout({self.out_features} x {self.in_features}, {len(self.tiles)} tiles, "
            f"{self.numel} stored for {self.visible} visible)"
        )


def padding(prefix: Tensor, table: Tensor) -> Tensor:
    """Returns where the padding lies: int64 indices into the packed storage, on the device of ``prefix``."""
    return cached(
        table, "padding", lambda: _find_padding(prefix.cpu(), tiles_of(table)).to(prefix.device), also=[prefix]
    )


def padding_is_held(table: Tensor) -> bool:
    """Returns whether the indices of a layout's padding lie in memory, found and kept by ``padding``."""
    return is_cached(table, "padding")


def _find_padding(prefix: Tensor, tiles: Sequence[Tile]) -> Tensor:
    parts = [prefix.new_empty(0)]
    for tile in tiles:
        rows = prefix[tile.row_start : tile.row_end, None]
        ragged = int(rows[0])  # up to here every row of the tile sees everything
        row, column = (torch.arange(ragged, tile.width, device="cpu") >= rows).nonzero(as_tuple=True)
        parts.append(row.mul_(tile.width).add_(column).add_(tile.offset + ragged))
    return torch.cat(parts)


def zero_padding(packed: Tensor, prefix: Tensor, table: Tensor) -> Tensor:
    """Writes zero to the padding of ``packed``, in place, and returns it; for ops, which receive a layout's table."""
    return packed.index_fill_(0, padding(prefix, table), 0)
