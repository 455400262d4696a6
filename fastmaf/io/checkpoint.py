"""Loading of flows from safetensors files, which contain nothing executable.

The tensors are the ``state_dict`` of the flow; the metadata holds its configuration as JSON under the key
``"fastmaf"``. Names, shapes, dtypes and finiteness are checked against the configuration before a flow is built.
``fastmaf.io.write_flow`` writes these files.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaf.bases import BASES
from fastmaf.flows import IAF, MAF, Flow
from fastmaf.io.flow_config import flow_config, parts
from fastmaf.io.flow_tensors import EXTRA, flow_tensors
from fastmaf.io.packed_weights import read_weights
from fastmaf.io.safe_json import shown
from fastmaf.io.tensor_file import CheckpointError, TensorFile
from fastmaf.sharing import share_again
from fastmaf.transforms import TRANSFORMS, transform_from
from fastmaf.validation import default_device


class SavedFlow(NamedTuple):
    """The contents of a model file; returned by ``fastmaf.load_with_extras``.

    Attributes:
        flow: the flow.
        metadata: the strings saved beside it, and the configuration under ``"fastmaf"``.
        extras: the tensors saved beside it, on the CPU.

    Example:
        >>> fastmaf.SavedFlow._fields
        ('flow', 'metadata', 'extras')
    """

    flow: Flow
    metadata: dict[str, str]
    extras: dict[str, Tensor]


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Flow:
    """Loads a flow that ``Flow.save`` wrote.

    Untrusted files are safe to load: nothing in a file is executed, and every value and size is checked before use.

    Args:
        path: the file.
        device: the device of the flow.

    Returns:
        A ``MAF``, ``IAF`` or ``Flow``, as saved. A copy by ``to_inference`` with bfloat16 weights is frozen again: its
        parameters require no gradients.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is not a fastmaf model, has a newer format or is damaged, or its tensors do not fit
            its configuration.

    Example:
        >>> import pathlib, tempfile
        >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "flow.safetensors")
        ...     flow.save(path)
        ...     loaded = fastmaf.load(path)
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(loaded.log_prob(x), flow.log_prob(x))
        True
    """
    with TensorFile(path) as file:
        return _flow(file).to(device)


def load_with_extras(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> SavedFlow:
    """Loads a flow with the metadata and the extra tensors of its file, all from the same version of the file.

    Args:
        path: the file.
        device: the device of the flow; the extras stay on the CPU.

    Raises:
        FileNotFoundError, CheckpointError: as ``load``.

    Example:
        >>> import pathlib, tempfile
        >>> flow = fastmaf.MAF(features=3, blocks=1, hidden_features=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "flow.safetensors")
        ...     flow.save(path, metadata={"unit": "mm"}, extras={"mean": torch.ones(3)})
        ...     saved = fastmaf.load_with_extras(path)
        >>> saved.metadata["unit"], saved.extras["mean"]
        ('mm', tensor([1., 1., 1.]))
    """
    with TensorFile(path) as file:
        return read_with_extras(file, device)


def read_with_extras(file: TensorFile, device: torch.device | str = "cpu") -> SavedFlow:
    """Returns what ``load_with_extras`` does, of an open file or a part of one."""
    flow = _flow(file).to(device)
    extras = {name.removeprefix(EXTRA): file.read(name) for name in file.tensors if name.startswith(EXTRA)}
    return SavedFlow(flow, file.metadata, extras)


def _flow(file: TensorFile) -> Flow:
    try:
        config = flow_config(file.metadata, tuple(TRANSFORMS), tuple(BASES))
        tensors = flow_tensors(file, config)
        # Entering a device slows every call of torch down.
        with nullcontext() if default_device().type == "cpu" else torch.device("cpu"):
            flow = _build(config, tensors)
        _load_tensors(flow, tensors, read_weights(file, config, flow, tensors))
        share_again(flow, config.get("shared", {}))
        if any("weight_dtype" in part.entry for part in parts(config)):  # a copy by ``to_inference``
            flow.requires_grad_(False).eval()
    except CheckpointError:
        raise
    except Exception as error:  # registered classes of users may raise anything
        raise CheckpointError(f"{file.path}: {error}") from error
    return flow


def _build(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Flow:
    tensors_of: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        *place, rest = name.split(".", 1 if name.startswith("base.") else 2)
        tensors_of[".".join(place)][rest] = tensor
    transforms = [transform_from(entry, tensors_of[f"transforms.{i}"]) for i, entry in enumerate(config["transforms"])]
    entry = config.get("base")
    base = None if entry is None else BASES[entry["type"]].from_config(entry, tensors_of["base"])
    makers: dict[str, Callable[..., Flow]] = {"MAF": MAF.from_transforms, "IAF": IAF.from_transforms, "Flow": Flow}
    return makers[config["class"]](config["features"], transforms, base)


def _load_tensors(flow: Flow, tensors: dict[str, Tensor], read: set[str]) -> None:
    """Copies tensors into a flow that was built for them, whose weights ``read`` are there already.

    Shapes and dtypes must be equal.
    """
    # Not by its state_dict, which would look through the padding of all weights.
    for name, expected in (*flow.named_parameters(), *flow.named_buffers()):
        tensor = tensors.get(name, expected)
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"tensor {name}: expected {tuple(expected.shape)} {expected.dtype}, found {found}")
    missing, unexpected = flow.load_state_dict(tensors, strict=False)
    if odd := [*unexpected, *sorted(read ^ set(missing))]:
        raise ValueError(f"tensor {shown(odd[0])} is missing or unexpected")
