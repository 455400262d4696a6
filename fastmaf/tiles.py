"""Tiles: the packed storage of former versions, for what they saved.

A tile holds rows ``row_start..row_end`` of a masked weight and columns ``0..width``, row-major from ``offset`` on.
Model files of format version 1 state their tiles. A ``state_dict`` does not: there they follow from the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels import PackedLayout
from fastmaf.kernels.storage import from_rows

_ALIGNMENT, _MAX_STEPS, _MIN_NUMEL, _MAX_ROWS = 16, 16, 32_768, 4_096


class Tile(NamedTuple):
    """Rows ``row_start..row_end`` and columns ``0..width``, row-major from ``offset`` on."""

    row_start: int
    row_end: int
    width: int
    offset: int


def former_tiles(layout: PackedLayout, group: int = 1) -> list[Tile]:
    """Returns the tiles into which the last version with tiles cut a layer.

    Args:
        layout: of the layer.
        group: tiles began at multiples of this many rows: the outputs per feature of an output layer, else 1.
    """
    steps = min(_MAX_STEPS, max(1, layout.visible // _MIN_NUMEL))
    quantum = _round_up(-(-layout.in_features // steps))
    step_of_row = (layout.prefix[group - 1 :: group] + quantum - 1) // quantum
    tiles: list[Tile] = []
    row = offset = 0
    for run in torch.unique_consecutive(step_of_row, return_counts=True)[1].tolist():
        run_end = row + run * group
        while row < run_end:
            end = min(run_end, row + _MAX_ROWS // group * group)
            width = min(layout.in_features, _round_up(int(layout.prefix[end - 1])))
            tiles.append(Tile(row, end, width, offset))
            row, offset = end, offset + (end - row) * width
    return tiles


def _round_up(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def numel_of(tiles: Sequence[Tile]) -> int:
    """Returns how many numbers tiles hold, padding included."""
    return sum((tile.row_end - tile.row_start) * tile.width for tile in tiles)


def packs_tiles(packed: Tensor, layout: PackedLayout, version: int | None) -> bool:
    """Returns whether a weight of a ``state_dict`` lies in tiles.

    Args:
        packed: the weight.
        layout: of its layer.
        version: of the layer in the metadata of the ``state_dict``. Where it was lost, as in a plain dictionary, the
            size decides; a weight of a size that fits both is one of this version.
    """
    if version is not None:
        return version < 2
    return packed.numel() != layout.numel and any(packed.numel() == numel_of(t) for t in _possible_tiles(layout))


def tiles_to_panels(packed: Tensor, layout: PackedLayout, name: str) -> Tensor:
    """Returns a weight, or a moment of one, that former versions packed in tiles, packed as in this version.

    Raises:
        ValueError: it is not a weight of the layer; the message begins with ``name``.
    """
    possible = _possible_tiles(layout)
    for tiles in possible:
        if packed.shape == (numel_of(tiles),):
            return repacked(packed, tiles, layout, name)
    raise ValueError(
        f"{name}: expected {numel_of(possible[0])} numbers, as earlier versions of fastmaf packed the weight; found "
        f"shape {tuple(packed.shape)}"
    )


def _possible_tiles(layout: PackedLayout) -> list[list[Tile]]:
    """Returns the tiles for any number of outputs per feature that may have cut the layer."""
    groups = [group for group in range(1, 65) if layout.out_features % group == 0]
    return [former_tiles(layout, group) for group in groups]


def repacked(packed: Tensor, tiles: Sequence[Tile], layout: PackedLayout, name: str) -> Tensor:
    """Returns a weight that is packed in ``tiles``, which cover the layer, packed as in this version.

    Raises:
        ValueError: it holds numbers where the mask hides the weight; the message begins with ``name``.
    """
    rows = []
    for tile in tiles:
        sees = layout.prefix[tile.row_start : tile.row_end]
        visible = torch.arange(tile.width, device="cpu") < sees[:, None]
        numbers = packed[tile.offset : tile.offset + visible.numel()].reshape(visible.shape).cpu()
        if numbers[~visible].count_nonzero():
            raise ValueError(
                f"{name} holds numbers where the mask hides the weight, in rows {tile.row_start} to {tile.row_end}"
            )
        rows.append(numbers[visible])
    return from_rows(torch.cat(rows), layout)
