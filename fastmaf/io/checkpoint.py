"""Saving and loading flows: one safetensors file, nothing executable in it.

The tensors are the flow's ``state_dict``; the file's metadata holds the configuration as JSON under ``"fastmaf"``.
Before any of it is used, names, shapes, dtypes and finiteness are checked against the configuration.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmaf.flows import MAF, Flow
from fastmaf.io.atomic import replace, staging, sync_file, write_errors
from fastmaf.io.flow_config import FORMAT_VERSION, TILES, flow_config
from fastmaf.io.flow_tensors import EXTRA, flow_tensors
from fastmaf.io.safe_json import shown
from fastmaf.io.tensor_file import CheckpointError, TensorFile
from fastmaf.nn import MaskedLinear
from fastmaf.sharing import check_parts, names_below, share_again, shared_parts
from fastmaf.transforms import TRANSFORMS, Transform

__all__ = [
    "CheckpointError",
    "SavedFlow",
    "load",
    "load_with_extras",
    "read_extras",
    "read_tensors",
    "save",
    "write_tensors",
]


def save(
    flow: Flow,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes ``flow`` to ``path`` so that a crash leaves either the old file or the new one.

    Args:
        flow: any flow whose transforms are registered in ``fastmaf.transforms.TRANSFORMS``.
        path: a ``.safetensors`` file.
        metadata: further strings to keep beside the configuration.
        extras: further tensors to keep beside the flow's; ``load`` passes over them, ``read_extras`` returns them.

    Raises:
        ValueError: ``metadata`` uses the key ``"fastmaf"``, a number of the flow is not finite, or two tensors of the
            flow overlap in memory without being one.
            A block, layer or parameter that stands in several places does so again once it is loaded.
        TypeError: a transform is not registered, or a part of it is pruned, parametrised or of another class.
    """
    if metadata and "fastmaf" in metadata:
        raise ValueError("metadata key 'fastmaf' is reserved for the configuration")
    check_parts(flow)
    kinds = {cls: name for name, cls in TRANSFORMS.items()}
    transforms = []
    for transform in flow.transforms:
        if not isinstance(transform, Transform) or type(transform) not in kinds:
            raise TypeError(
                f"{type(transform).__name__} cannot be saved: list it in fastmaf.transforms.TRANSFORMS; "
                f"known are {sorted(cls.__name__ for cls in kinds)}"
            )
        transforms.append({"type": kinds[type(transform)], **transform.config()})
    shared = shared_parts(flow)
    # How the weights are packed depends on constants that are tuned from time to time: a file says it for itself.
    modules = flow.named_modules(remove_duplicate=False)
    tiles = {name: module.layout.tiles for name, module in modules if isinstance(module, MaskedLinear)}
    config = {
        "version": FORMAT_VERSION,
        "class": "MAF" if isinstance(flow, MAF) else "Flow",
        "features": flow.features,
        "transforms": transforms,
        "tiles": tiles,
        **({"shared": shared} if shared else {}),
    }
    kept = {**flow.state_dict(), **{f"{EXTRA}{k}": v for k, v in (extras or {}).items()}}
    # Copies of extras and of what is shared: safetensors refuses tensors that share memory, a file keeps values.
    tensors = {k: v.detach().contiguous() for k, v in kept.items()}
    tensors |= {k: tensors[k].clone() for k in names_below(tensors, shared)}
    tensors |= {k: v.clone() for k, v in tensors.items() if k.startswith(EXTRA)}
    for name, tensor in tensors.items():
        if not name.startswith(EXTRA) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name} holds numbers that are not finite, which load would refuse; nothing was written to {path}"
            )
    write_tensors(tensors, path, {**(metadata or {}), "fastmaf": json.dumps(config)})


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file through a temporary one: synced to disk, then moved into place.

    Raises:
        OSError: it cannot be written; the error names ``path``, and what was there before stays.
    """
    target = Path(os.path.realpath(path))  # a link stays, and what it points at is replaced
    with write_errors(path), staging(target.parent) as folder:
        temporary = folder / target.name
        save_file(dict(tensors), temporary, dict(metadata))
        os.chmod(temporary, folder.stat().st_mode & 0o666)  # safetensors writes for the owner alone
        sync_file(temporary)
        replace(temporary, target)


class SavedFlow(NamedTuple):
    """All that a model file holds: the flow, and the strings and tensors that were saved beside it."""

    flow: Flow
    metadata: dict[str, str]
    extras: dict[str, Tensor]


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Flow:
    """Loads a flow that ``save`` wrote.

    The file may come from anywhere: nothing in it is executed, and every value and size is checked before it is used.

    Args:
        path: the file.
        device: where its tensors go.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no fastmaf model, of a newer format, damaged, or its tensors do not fit its
            configuration.
    """
    with TensorFile(path) as file:
        return _flow(file).to(device)


def load_with_extras(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> SavedFlow:
    """Loads a flow and what was saved beside it, all of one version of the file; see ``load``.

    ``device`` is that of the flow; extras stay on the CPU.
    """
    with TensorFile(path) as file:
        return SavedFlow(_flow(file).to(device), file.metadata, _extras(file))


def read_extras(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns what was saved beside a flow as ``extras``, by name. Raises as ``read_tensors`` does."""
    with TensorFile(path) as file:
        return _extras(file)


def read_tensors(path: str | os.PathLike[str], *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file, or none of them, and its metadata.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a safetensors file, or is damaged.
    """
    with TensorFile(path) as file:
        return ({name: file.read(name) for name in file.tensors} if tensors else {}), file.metadata


def _extras(file: TensorFile) -> dict[str, Tensor]:
    return {name.removeprefix(EXTRA): file.read(name) for name in file.tensors if name.startswith(EXTRA)}


def _flow(file: TensorFile) -> Flow:
    try:
        config = flow_config(file.metadata, tuple(TRANSFORMS))
        tensors = flow_tensors(file, config)
        with torch.device("cpu"):
            flow = _built(config, tensors)
        _load_tensors(flow, tensors, config["tiles"])
        share_again(flow, config.get("shared", {}))
    except CheckpointError:
        raise
    except Exception as error:  # a class that was registered in TRANSFORMS may raise anything
        raise CheckpointError(f"{file.path}: {error}") from error
    return flow


def _built(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Flow:
    own: list[dict[str, Tensor]] = [{} for _ in config["transforms"]]
    for name, tensor in tensors.items():
        _, place, rest = name.split(".", 2)
        own[int(place)][rest] = tensor
    entries = zip(config["transforms"], own, strict=True)
    transforms = [TRANSFORMS[entry["type"]].from_config(entry, found) for entry, found in entries]
    return (MAF.from_transforms if config["class"] == "MAF" else Flow)(config["features"], transforms)


def _load_tensors(flow: Flow, tensors: dict[str, Tensor], tiles: Mapping[str, Any]) -> None:
    """Copies tensors into a flow that was built for them, each of the same shape and dtype."""
    layers = {name: module.layout for name, module in flow.named_modules() if isinstance(module, MaskedLinear)}
    if tiles.keys() != layers.keys():
        odd = min(tiles.keys() ^ layers.keys())
        raise ValueError(f"{TILES}: expected the layers of the flow; {shown(odd)} is missing or unexpected")
    own = flow.state_dict()
    for name, expected in own.items():
        found = tensors.get(name)
        if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
            what = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
            raise ValueError(f"tensor {name}: expected {tuple(expected.shape)} {expected.dtype}, found {what}")
    flow.load_state_dict(tensors)
