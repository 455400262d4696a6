"""Packed weights in model files of format version 1, which state the tiles that hold them.

Tiles followed from the degrees and from constants that changed between versions. They are accepted only if they are a
complete packing of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmaf.io.flow_config import TILES
from fastmaf.io.safe_json import child
from fastmaf.io.schema import ListOf, SchemaError, Whole
from fastmaf.kernels import PackedLayout
from fastmaf.tiles import Tile, numel_of, repacked

_TILE = ListOf(Whole(), shortest=4, longest=4)


def packed_weight(layout: PackedLayout, tiles: Sequence[Any], packed: Tensor, name: str) -> Tensor:
    """Returns the weight of the layer ``name`` of a file, which has these unchecked tiles, packed as in this version.

    Raises:
        SchemaError: the tiles are not a packing of the layer, or the weight has another size.
        ValueError: the weight holds numbers where the mask hides it.
    """
    checked = _checked(layout, tiles, child(TILES, name))
    if packed.shape != (numel_of(checked),):
        raise SchemaError(
            f"tensor {name}.weight: expected {numel_of(checked)} numbers, as many as its tiles hold; found "
            f"{packed.numel()}"
        )
    return repacked(packed, checked, layout, f"tensor {name}.weight")


def _checked(layout: PackedLayout, tiles: Sequence[Any], where: str) -> list[Tile]:
    """Returns the tiles, which must cover every row once, in order, and every weight that a row sees."""
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
    return checked
