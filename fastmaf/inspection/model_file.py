"""Files of inspection models of every kind: which kind a file holds, and reading it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import fastmaf
from fastmaf.inspection.model_schema import KEY
from fastmaf.io.safe_json import parse, shown
from fastmaf.io.tensor_file import TensorFile, read_tensors
from fastmaf.training.checkpoints import MODEL_FILE

PIXELS = "pixels"
KINDS = {
    PIXELS: "fastmaf.inspection.model",
    "combined": "fastmaf.inspection.combined",
    "features": "fastmaf.inspection.features.read",
    "framed": "fastmaf.inspection.framed",
    "posed": "fastmaf.inspection.posed",
    "tiled": "fastmaf.inspection.tiled",
    "texture": "fastmaf.inspection.texture.file",
}
"""The module of each kind of model. Its ``read_model(file, device=...)`` reads a model from an open ``TensorFile``.

The kind is the entry ``"kind"`` of the record in a file's metadata; a file without one holds a model of pixels.
"""


def is_inspection_model(path: str | Path) -> bool:
    """Returns whether a file, or the model file in a run's folder, holds an inspection model.

    Raises:
        FileNotFoundError: there is no such file.
        fastmaf.CheckpointError: it is not a safetensors file.
    """
    return KEY in read_tensors(model_file(path), tensors=False)[1]


def model_file(path: str | Path) -> Path:
    """Returns the model file that a path names: the path itself, or the file in a run's folder."""
    path = Path(path)
    return path / MODEL_FILE if path.is_dir() else path


@fastmaf.torch_defaults()
def load_inspection(path: str | Path, *, device: str = "cpu") -> Any:
    """Loads an inspection model of any kind from its file, or from the model file in a run's folder.

    Returns:
        An ``AnomalyModel``: an ``InspectionModel``, ``CombinedModel`` or another of ``KINDS``.

    Raises:
        FileNotFoundError: there is no such file.
        fastmaf.CheckpointError: it is not an inspection model, or damaged.
    """
    path = model_file(path)
    with TensorFile(path) as file:
        if KEY not in file.metadata:
            raise fastmaf.CheckpointError(
                f"{path} is not an inspection model: expected one written by 'fastmaf inspect fit'"
            )
        return read_kind(file, device=device)


def read_kind(file: TensorFile, *, device: str = "cpu") -> Any:
    """Reads a model of any kind from an open file, or from a part of one; see ``load_inspection``."""
    return import_module(KINDS[kind_of(file)]).read_model(file, device=device)


def kind_of(file: TensorFile) -> str:
    """Returns the kind of model that an open file, or a part of one, holds; errors as ``load_inspection``."""
    try:
        record = parse(file.metadata[KEY], KEY)
    except KeyError:
        raise fastmaf.CheckpointError(f"{file.path}: a part of it is not an inspection model") from None
    except ValueError as error:
        raise fastmaf.CheckpointError(f"{file.path}: {error}") from error
    kind = record.get("kind", PIXELS) if isinstance(record, dict) else PIXELS
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(KINDS)
        raise fastmaf.CheckpointError(f"{file.path}: expected a model of a kind among {known}; found {shown(kind)}")
    return kind
