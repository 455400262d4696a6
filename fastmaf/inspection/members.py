"""The models of the folds beside a model: ``fastmaf train --recipe inspection --keep-folds``.

Their mean is one more score in the table of ``fastmaf eval``. Each is as large as the model itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import fastmaf
from fastmaf.inspection.model import InspectionModel
from fastmaf.io.atomic import replace

FOLDS_FOLDER = "folds"


def save_members(run: Path, model: InspectionModel, flows: Sequence[fastmaf.Flow]) -> None:
    """Writes the flows of the folds into a run's folder."""
    folder = run / FOLDS_FOLDER
    folder.mkdir(exist_ok=True)
    for k, flow in enumerate(flows, 1):
        flow.save(folder / f"fold-{k}.safetensors", {"statistics": _print_of(model)})


def replace_members(new: Path, run: Path) -> None:
    """Moves the flows of the folds from one folder into a run's, if there are any, in place of an earlier model's.

    Those are large, and of use with their own model alone.
    """
    folder = run / FOLDS_FOLDER
    for file in folder.glob("fold-*.safetensors"):
        file.unlink()
    for file in sorted((new / FOLDS_FOLDER).glob("fold-*.safetensors")):
        folder.mkdir(exist_ok=True)
        replace(file, folder / file.name)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def load_members(run: Path, model: InspectionModel) -> list[fastmaf.Flow]:
    """Returns the flows of the folds of this model, on its device; none where they were not kept, are another's, or
    one is missing.
    """
    files = sorted((run / FOLDS_FOLDER).glob("fold-*.safetensors"))
    own = [f for f in files if fastmaf.read_tensors(f, tensors=False)[1].get("statistics") == _print_of(model)]
    if len(own) != len(model.about.get("images_of_folds", own)):
        return []
    return [fastmaf.load(file).eval().to(model.device) for file in own]


def _print_of(model: InspectionModel) -> str:
    """What tells whether folds belong to a model: the statistics of their terms."""
    return hashlib.sha256(model.statistics.mean.cpu().numpy().tobytes()).hexdigest()[:16]
