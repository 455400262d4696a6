"""Saving and loading flows: one safetensors file, nothing executable in it.

The tensors are the flow's ``state_dict``; the file's metadata holds the configuration as JSON under ``"fastmaf"``.
Before any of it is used, names, shapes, dtypes and finiteness are checked against the configuration.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmaf.flows import MAF, Flow
from fastmaf.kernels.layout import Tile
from fastmaf.nn import MaskedLinear
from fastmaf.sharing import check_parts, names_below, share_again, shared_parts
from fastmaf.transforms import TRANSFORMS, Transform

FORMAT_VERSION = 1
_EXTRA = "extra."


class CheckpointError(ValueError):
    """The file is not a model that this version of fastmaf can load; the message says why."""


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
        ValueError: ``metadata`` uses the key ``"fastmaf"``, or two tensors of the flow overlap in memory without being
            one. A block, layer or parameter that stands in several places does so again once it is loaded.
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
    kept = {**flow.state_dict(), **{f"{_EXTRA}{k}": v for k, v in (extras or {}).items()}}
    # Copies of extras and of what is shared: safetensors refuses tensors that share memory, a file keeps values.
    tensors = {k: v.detach().contiguous() for k, v in kept.items()}
    tensors |= {k: tensors[k].clone() for k in names_below(tensors, shared)}
    tensors |= {k: v.clone() for k, v in tensors.items() if k.startswith(_EXTRA)}
    write_tensors(tensors, path, {**(metadata or {}), "fastmaf": json.dumps(config)})


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file through a temporary one: synced to disk, then moved into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed process left is written over
    try:
        save_file(dict(tensors), temporary, dict(metadata))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors writes for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Flow:
    """Loads a flow that ``save`` wrote.

    Args:
        path: the file.
        device: where its tensors go.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no fastmaf model, of a newer format, damaged, or its tensors do not fit its
            configuration.
    """
    tensors, metadata = read_tensors(path)
    tensors = {k: v for k, v in tensors.items() if not k.startswith(_EXTRA)}
    config = _config(path, metadata)
    try:
        built = []
        for i, entry in enumerate(config["transforms"]):
            own = {
                k.removeprefix(f"transforms.{i}."): v for k, v in tensors.items() if k.startswith(f"transforms.{i}.")
            }
            built.append(TRANSFORMS[entry["type"]].from_config(entry, own))
        flow = (MAF.from_transforms if config["class"] == "MAF" else Flow)(config["features"], built)
        _repack(flow, tensors, config["tiles"])
        _check_tensors(flow, tensors)
        flow.load_state_dict(tensors)
        share_again(flow, config.get("shared", {}))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"{path}: {error}") from error
        raise CheckpointError(f"{path}: the tensors do not fit the configuration in the file: {error}") from error
    return flow.to(device)


def read_extras(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns what was saved beside a flow as ``extras``, by name. Raises as ``read_tensors`` does."""
    return {k.removeprefix(_EXTRA): v for k, v in read_tensors(path)[0].items() if k.startswith(_EXTRA)}


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it but to set it
    os.umask(mask)
    return mask


def read_tensors(path: str | os.PathLike[str], *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file, or none of them, and its metadata.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a safetensors file, or is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: what get_tensor returns is a map of the file, which Windows would not let the next save replace.
            found = {key: file.get_tensor(key).clone() for key in file.keys()} if tensors else {}  # noqa: SIM118
            return found, dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged: {error}") from error


def _config(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    if "fastmaf" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not a fastmaf model: its metadata has no 'fastmaf' entry (found "
            f"{sorted(metadata) or 'none'})"
        )
    try:
        config: dict[str, Any] = json.loads(metadata["fastmaf"])
        version, kinds = config["version"], [entry["type"] for entry in config["transforms"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the configuration in its metadata cannot be read: {error!r}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this fastmaf reads version {FORMAT_VERSION}: update fastmaf"
        )
    unknown = sorted(set(kinds) - set(TRANSFORMS))
    if unknown:
        raise CheckpointError(
            f"{path} holds transforms unknown to this version: {unknown}; known are {sorted(TRANSFORMS)}"
        )
    return config


def _repack(flow: Flow, tensors: dict[str, Tensor], tiles: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Brings weights that were packed with other tiles into this version's layout."""
    for name, module in flow.named_modules():
        if isinstance(module, MaskedLinear) and (found := [Tile(*tile) for tile in tiles[name]]) != module.layout.tiles:
            dense = module.layout.unpack(tensors[f"{name}.weight"], found)
            tensors[f"{name}.weight"] = module.layout.pack(dense)


def _check_tensors(flow: Flow, tensors: Mapping[str, Tensor]) -> None:
    own = flow.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(
            f"tensor names do not fit the configuration: missing {missing[:3] or 'none'}, unexpected "
            f"{extra[:3] or 'none'}"
        )
    for name, expected in own.items():
        found = tensors[name]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise CheckpointError(
                f"tensor {name}: expected {tuple(expected.shape)} {expected.dtype}, found {tuple(found.shape)} "
                f"{found.dtype}"
            )
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise CheckpointError(f"tensor {name} holds values that are not finite")
