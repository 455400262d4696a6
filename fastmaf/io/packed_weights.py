"""Packed weights in model files: row after row, the visible weights alone, whatever the panels of this version are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fastmaf.io.flow_config import TILES, Config
from fastmaf.io.safe_json import shown
from fastmaf.io.schema import SchemaError
from fastmaf.io.tensor_file import Streamed, TensorFile
from fastmaf.io.tiles import packed_weight
from fastmaf.kernels.storage import Part, from_rows, in_threads, panels_to_rows, parts, rows_to_panels
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
    if (found := file.tensors[name].dtype) != layer.weight.dtype:
        raise ValueError(f"tensor {name}: expected {layer.weight.dtype}, found {found}")


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
    """Reads a weight into the memory of the layer, part by part."""
    _check_rows(name, file.tensors[name].shape, layer)
    weight, layout = layer.weight.detach(), layer.layout
    todo = parts(layout, weight.element_size())

    def work(items: Iterator[Part]) -> None:
        buffer = torch.empty(max(part.numel for part in todo), dtype=weight.dtype, device="cpu")
        for part in items:
            rows = buffer[: part.numel]
            file.read_into(rows, name, part.first)
            if not rows_to_panels(rows, weight, layout, part):
                raise _not_finite(name)

    in_threads(work, todo)


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
    layout = layer.layout

    def chunks() -> Iterator[Tensor]:
        packed = weight.detach().cpu().contiguous()
        todo = parts(layout, packed.element_size())
        buffer = packed.new_empty(max(part.numel for part in todo))
        for part in todo:
            rows = buffer[: part.numel]
            if not panels_to_rows(packed, rows, layout, part):
                raise not_finite(name, path)
            yield rows

    return Streamed(weight.dtype, layout.visible, chunks)


def not_finite(name: str, path: object) -> ValueError:
    """Returns the error of a tensor that cannot be saved, as it could not be loaded."""
    return ValueError(
        f"{name} holds numbers that are not finite, which load would refuse; nothing was written to {path}"
    )
