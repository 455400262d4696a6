"""Conversion of packed weights in a model file, whose tiles may differ from those of this version.

Tiles follow from the degrees and from constants that change between versions. A file states its tiles. They are
accepted only if they are a complete packing of the layer; the weights are then copied into the tiles of this version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastmaf.io.flow_config import TILES
from fastmaf.io.safe_json import child
from fastmaf.io.schema import ListOf, SchemaError, Whole
from fastmaf.kernels import PackedLayout


class Tile(NamedTuple):
    """Rows ``row_start..row_end`` and columns ``0..width`` of a masked weight, row-major from ``offset`` on."""

    row_start: int
    row_end: int
    width: int
    offset: int

    def of(self, packed: Tensor) -> Tensor:
        """Returns the tile as a matrix that shares the memory of ``packed``."""
        rows = self.row_end - self.row_start
        return packed.narrow(0, self.offset, rows * self.width).view(rows, self.width)


_TILE = ListOf(Whole(), shortest=4, longest=4)
# Limits how much larger a layer may be than its weights in the file, which differ by padding only.
_GROWTH, _SMALL = 4, 65_536


def repacked(layout: PackedLayout, tiles: Sequence[Any], packed: Tensor, name: str) -> Tensor:
    """Returns the weight of the layer ``name`` of a file, which has these unchecked tiles, in the tiles of ``layout``.

    Raises:
        SchemaError: the tiles are not a packing of the layer, or the weight has another size.
    """
    where = child(TILES, name)
    stored, numel = _checked(layout, tiles, where)
    if packed.numel() != numel:
        raise SchemaError(
            f"tensor {name}.weight: expected {numel} numbers, as many as its tiles hold; found {packed.numel()}"
        )
    if stored == layout.tiles:
        return packed
    if layout.numel > _GROWTH * numel + _SMALL:
        raise SchemaError(f"{where}: expected tiles like this version's, of {layout.numel} numbers; found {numel}")
    result, i = packed.new_zeros(layout.numel), 0
    for tile in layout.tiles:
        row = tile.row_start
        while row < tile.row_end:
            source = stored[i]
            end, width = min(tile.row_end, source.row_end), min(tile.width, source.width)
            rows = source.of(packed)[row - source.row_start : end - source.row_start]
            if rows[:, width:].count_nonzero():
                raise SchemaError(
                    f"tensor {name}.weight holds numbers where the mask hides the weight, in rows {row} to {end}"
                )
            tile.of(result)[row - tile.row_start : end - tile.row_start, :width] = rows[:, :width]
            row, i = end, i + (end == source.row_end)
    return result


def _checked(layout: PackedLayout, tiles: Sequence[Any], where: str) -> tuple[list[Tile], int]:
    """Returns the tiles and their size; they must cover every row once, in order, and every weight that a row sees."""
    if not 0 < len(tiles) <= layout.out_features:
        raise SchemaError(f"{where}: expected 1 to {layout.out_features} tiles; found {len(tiles)}")
    row = offset = 0
    checked = []
    for i, entry in enumerate(tiles):
        _TILE.check(entry, child(where, i))
        tile = Tile(*entry)
        if tile.row_start != row or not row < tile.row_end <= layout.out_features or tile.offset != offset:
            raise SchemaError(f"{child(where, i)}: expected rows from {row} at offset {offset}; found {entry}")
        least = int(layout.prefix[tile.row_end - 1])
        if not least <= tile.width <= layout.in_features:
            raise SchemaError(
                f"{child(where, i)}: expected a width of {least} to {layout.in_features}; found {tile.width}"
            )
        row, offset = tile.row_end, offset + (tile.row_end - row) * tile.width
        checked.append(tile)
    if row != layout.out_features:
        raise SchemaError(f"{where}: expected tiles that cover {layout.out_features} rows; found {row}")
    return checked, offset
