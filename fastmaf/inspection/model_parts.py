"""Models of several parts in one file: names of tensors and keys of the metadata begin with the number of the part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.model_file import kind_of, read_kind
from fastmaf.inspection.model_schema import KEY
from fastmaf.io.atomic import staging
from fastmaf.io.tensor_file import TensorFile, read_tensors


def tensors_of_parts(parts: Sequence[AnomalyModel], folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of the files of the parts, which are written to ``folder`` meanwhile."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    with staging(folder) as staged:
        for i, part in enumerate(parts):
            file = staged / f"{i}.safetensors"
            part.save(file)
            of_part, texts = read_tensors(file)
            file.unlink()
            tensors |= {f"{i}/{name}": tensor for name, tensor in of_part.items()}
            metadata |= {f"{i}/{key}": text for key, text in texts.items()}
    return tensors, metadata


def read_parts(file: TensorFile, n: int, kind: str, *, device: str) -> tuple[AnomalyModel, ...]:
    """Reads the parts of a model of this kind from an open file.

    Raises:
        ValueError: a part is of the same kind.
        fastmaf.CheckpointError: a part is no inspection model, or damaged.
    """
    parts = []
    for i in range(n):
        part = file.within(f"{i}/")
        if KEY in part.metadata and kind_of(part) == kind:
            raise ValueError(f"part {i} is a {kind} model itself")
        parts.append(read_kind(part, device=device))
    return tuple(parts)
