"""Packed weights in model files: row after row, the visible weights alone, whatever the panels of this version are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor, nn

from fastmaf.io.base_kinds import Config
from fastmaf.io.flow_config import TILES
from fastmaf.io.safe_json import shown
from fastmaf.io.schema import SchemaError
from fastmaf.io.tensor_file import Streamed, TensorFile
from fastmaf.io.tiles import packed_weight
from fastmaf.kernels.float8 import BYTE, FLOAT8
from fastmaf.kernels.storage import from_rows, read_rows, write_rows
from fastmaf.nn import MaskedLinear


def masked_layers(flow: nn.Module) -> dict[str, MaskedLinear]:
    """Returns the layers with packed weights by name, shared ones under each of their names."""
    modules = flow.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, MaskedLinear)}


def read_weights(file: TensorFile, config: Config, flow: nn.Module, tensors: dict[str, Tensor]) -> set[str]:
    """Reads the packed weights of a file into a flow that was built for it, but for those that are in ``tensors``:
    transforms of users were built from them. There they are replaced by what can be loaded into the flow.

    Returns:
        The names of the weights that were read.

    Raises:
        ValueError: a weight is missing, has another size or dtype, or is not finite.
        CheckpointError: the file was truncated, or there is no memory for a weight.
    """
    layers, tiles = masked_layers(flow), config.get("tiles", {})
    if "tiles" in config and tiles.keys() != layers.keys():
        odd = min(tiles.keys() ^ layers.keys())
        raise ValueError(f"{TILES}: expected the layers of the flow; {shown(odd)} is missing or unexpected")
    read = set()
    for name, layer in layers.items():
        weight = f"{name}.weight"
        if weight in tensors:
            tensors[weight] = _packed(tensors[weight], config, name, layer)
        elif weight in file.tensors:
            _check(file, weight, layer)
            if "tiles" in config:
                layer.weight.data.copy_(_finite(_packed(file.read(weight), config, name, layer), weight))
            else:
                _read_rows(file, weight, layer)
            read.add(weight)
    return read


def _check(file: TensorFile, name: str, layer: MaskedLinear) -> None:
    if (found := file.tensors[name].dtype) != layer.weight_dtype:
        raise ValueError(f"tensor {name}: expected {layer.weight_dtype}, found {found}")


def _packed(tensor: Tensor, config: Config, name: str, layer: MaskedLinear) -> Tensor:
    if "tiles" in config:
        return packed_weight(layer.layout, config["tiles"][name], tensor, name)
    return weight_of_rows(f"{name}.weight", tensor, layer)


def weight_of_rows(name: str, rows: Tensor, layer: MaskedLinear) -> Tensor:
    """Returns the packed weight, or a moment of it, for what a file has of it.

    Raises:
        SchemaError: it has another size.
    """
    _check_rows(name, tuple(rows.shape), layer)
    return from_rows(rows, layer.layout)


def _check_rows(name: str, shape: tuple[int, ...], layer: MaskedLinear) -> None:
    if shape != (layer.layout.visible,):
        raise SchemaError(f"tensor {name}: expected {layer.layout.visible} weights; found shape {shown(shape)}")


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise _not_finite(name)
    return tensor


def _not_finite(name: str) -> SchemaError:
    return SchemaError(f"tensor {shown(name)} holds values that are not finite")


def _read_rows(file: TensorFile, name: str, layer: MaskedLinear) -> None:
    """Reads a weight into the memory of the layer."""
    _check_rows(name, file.tensors[name].shape, layer)
    with file.at(name) as rows:
        finite = read_rows(rows, layer.weight.detach(), layer.layout)
    if not finite:
        raise _not_finite(name)


def streamed_weights(flow: nn.Module, tensors: Mapping[str, Tensor], path: object) -> dict[str, Streamed]:
    """Returns the packed weights among the tensors of a flow, as they are written to a file.

    Raises:
        ValueError: while they are written: a weight is not finite.
    """
    return {
        weight: streamed_rows(tensors[weight], layer, weight, path)
        for name, layer in masked_layers(flow).items()
        if (weight := f"{name}.weight") in tensors
    }


def streamed_rows(weight: Tensor, layer: MaskedLinear, name: str, path: object) -> Streamed:
    """Returns a packed weight, or a moment of it, as it is written to the file ``path``; see ``streamed_weights``."""

    def write(file: BinaryIO) -> None:
        if not write_rows(file, weight.detach().cpu().contiguous(), layer.layout):
            raise not_finite(name, path)

    return Streamed(FLOAT8 if weight.dtype == BYTE else weight.dtype, layer.layout.visible, write)


def not_finite(name: str, path: object) -> ValueError:
    """Returns the error of a tensor that cannot be saved, as it could not be loaded."""
    return ValueError(
        f"{name} holds numbers that are not finite, which load would refuse; nothing was written to {path}"
    )
