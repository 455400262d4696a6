"""The models of the folds beside a model: ``fastmaf train --recipe inspection --keep-folds``.

Their mean is one more score in the table of ``fastmaf eval``. Each is as large as the model itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import fastmaf
from fastmaf.images.dataset import check_takes_images
from fastmaf.inspection.model import InspectionModel
from fastmaf.io.atomic import replace
from fastmaf.io.tensor_file import read_tensors

FOLDS_FOLDER = "folds"


@fastmaf.torch_defaults()
def save_members(run: Path, model: InspectionModel, flows: Sequence[fastmaf.Flow]) -> None:
    """Writes the flows of the folds into a run's folder."""
    for file, flow in zip(member_files(run, len(flows)), flows, strict=True):
        flow.save(file, {"statistics": _print_of(model)})


def member_files(run: Path, n: int) -> list[Path]:
    """The files of so many folds."""
    return [run / FOLDS_FOLDER / f"fold-{k}.safetensors" for k in range(1, n + 1)]


def replace_members(new: Path, run: Path) -> None:
    """Moves the flows of the folds from one folder into a run's, if there are any, in place of an earlier model's.

    Those are large, and of use with their own model alone. Other files there stay, whatever their names.
    """
    folder = run / FOLDS_FOLDER
    for file in folder.glob("fold-*.safetensors"):
        if _statistics(file) is not None:
            file.unlink()
    for file in sorted((new / FOLDS_FOLDER).glob("fold-*.safetensors")):
        folder.mkdir(exist_ok=True)
        replace(file, folder / file.name)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@fastmaf.torch_defaults()
def load_members(run: Path, model: InspectionModel) -> list[fastmaf.Flow]:
    """Returns the flows of the folds of this model, on its device; none where they were not kept, are another's, or
    one is missing.

    Raises:
        fastmaf.CheckpointError: a file is damaged.
    """
    files = sorted((run / FOLDS_FOLDER).glob("fold-*.safetensors"))
    own = [f for f in files if read_tensors(f, tensors=False)[1].get("statistics") == _print_of(model)]
    flows = [fastmaf.load(file, device=model.device).eval() for file in own]
    for file, flow in zip(own, flows, strict=True):
        check_takes_images(flow, file)
        if flow.features != model.flow.features:
            raise fastmaf.CheckpointError(
                f"{file}: expected a flow of {model.flow.features} features, as its model's; found {flow.features}"
            )
    return flows if len(own) == len(model.about.get("images_of_folds", own)) else []


def _statistics(file: Path) -> str | None:
    """What a file says of the model that it belongs to; None for a file that is no fold's model."""
    try:
        return read_tensors(file, tensors=False)[1].get("statistics")
    except (OSError, fastmaf.CheckpointError):
        return None


def _print_of(model: InspectionModel) -> str:
    """What tells whether folds belong to a model: the statistics of their terms."""
    return hashlib.sha256(model.statistics.mean.cpu().numpy().tobytes()).hexdigest()[:16]
