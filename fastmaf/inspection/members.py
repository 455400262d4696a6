"""The models of the folds beside a model: ``fastmaf train --recipe inspection --keep-folds``.

Their mean is one more score in the table of ``fastmaf eval``. Each is as large as the model itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import fastmaf
from fastmaf.capsule.models import check_takes_images
from fastmaf.inspection.model import InspectionModel

FOLDS_FOLDER = "folds"


def save_members(run: Path, model: InspectionModel, flows: Sequence[fastmaf.Flow]) -> None:
    """Writes the flows of the folds into a run's folder."""
    folder = run / FOLDS_FOLDER
    folder.mkdir(exist_ok=True)
    for k, flow in enumerate(flows, 1):
        flow.save(folder / f"fold-{k}.safetensors", {"statistics": _print_of(model)})


def remove_members(run: Path) -> None:
    """Removes the flows of the folds from a run's folder: they are large, and of use with their own model alone."""
    folder = run / FOLDS_FOLDER
    for file in folder.glob("fold-*.safetensors"):
        file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def load_members(run: Path, model: InspectionModel) -> list[fastmaf.Flow]:
    """Returns the flows of the folds of this model, on its device; none where they were not kept, or are another's.

    Raises:
        fastmaf.CheckpointError: a file is damaged.
    """
    files = sorted((run / FOLDS_FOLDER).glob("fold-*.safetensors"))
    own = [f for f in files if fastmaf.read_tensors(f, tensors=False)[1].get("statistics") == _print_of(model)]
    flows = [fastmaf.load(file, device=model.device).eval() for file in own]
    for file, flow in zip(own, flows, strict=True):
        check_takes_images(flow, file)
        if flow.features != model.flow.features:
            raise fastmaf.CheckpointError(
                f"{file}: expected a flow of {model.flow.features} features, as its model's; found {flow.features}"
            )
    return flows


def _print_of(model: InspectionModel) -> str:
    """What tells whether folds belong to a model: the statistics of their terms."""
    return hashlib.sha256(model.statistics.mean.cpu().numpy().tobytes()).hexdigest()[:16]
