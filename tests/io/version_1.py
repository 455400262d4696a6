"""What earlier versions of fastmaf saved: packed weights in tiles."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

import fastmaf
from fastmaf.io.tensor_file import write_tensors
from fastmaf.tiles import Tile, former_tiles
from tests.core.helpers import layers_of


def tiles_of(flow: fastmaf.Flow) -> dict[str, list[Tile]]:
    return {name: former_tiles(layer.layout, 2 if "output" in name else 1) for name, layer in layers_of(flow).items()}


def in_tiles(dense: Tensor, tiles: list[Tile]) -> Tensor:
    return torch.cat([dense[tile.row_start : tile.row_end, : tile.width].flatten() for tile in tiles])


def version_1_state(flow: fastmaf.Flow) -> dict[str, Tensor]:
    """Returns the ``state_dict`` of a flow as it was, without its metadata."""
    state, layers = dict(flow.state_dict()), layers_of(flow)
    return state | {f"{name}.weight": in_tiles(layers[name].dense_weight(), t) for name, t in tiles_of(flow).items()}


def write_version_1(flow: fastmaf.Flow, path: Path) -> None:
    config = {"version": 1, **flow.config(), "tiles": tiles_of(flow)}
    write_tensors(version_1_state(flow), path, {"fastmaf": json.dumps(config)})
