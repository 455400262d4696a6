"""Files of the fold models beside a model: ``fastmaf inspect fit --keep-folds``.

Their mean is one more score in the table of ``fastmaf inspect eval``. Each is as large as the model itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import fastmaf
from fastmaf.images.dataset import check_takes_images
from fastmaf.inspection.framed import seen_by
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.scoring.float64_flow import check_base
from fastmaf.io.atomic import replace
from fastmaf.io.tensor_file import read_tensors

FOLDS_FOLDER = "folds"


@fastmaf.torch_defaults()
def save_fold_models(run: Path, model: InspectionModel, flows: Sequence[fastmaf.Flow]) -> None:
    """Writes the fold models of ``model`` into a run's folder."""
    for file, flow in zip(fold_model_files(run, len(flows)), flows, strict=True):
        flow.save(file, {"statistics": _fingerprint(model)})


def fold_model_files(run: Path, n: int) -> list[Path]:
    """Returns the files of n fold models."""
    return [run / FOLDS_FOLDER / f"fold-{k}.safetensors" for k in range(1, n + 1)]


def replace_fold_models(new: Path, run: Path) -> None:
    """Moves the fold models of one folder, if any, into a run's folder, in place of those of an earlier model.

    Earlier fold models are large and useful with their own model only. Other files in the folder are kept.
    """
    folder = run / FOLDS_FOLDER
    for file in _files(run):
        if _owner(file) is not None:
            file.unlink()
    for file in _files(new):
        folder.mkdir(exist_ok=True)
        replace(file, folder / file.name)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@fastmaf.torch_defaults()
def load_fold_models(run: Path, model: AnomalyModel) -> list[fastmaf.Flow]:
    """Returns the fold models of ``model``, on its device; none if they were not kept, one is missing,
    or the model is not one of pixels.

    Raises:
        fastmaf.CheckpointError: a file is damaged.
    """
    flows: list[fastmaf.Flow] = []
    model = seen_by(model)
    if not isinstance(model, InspectionModel):
        return flows
    for file in _files(run):
        if read_tensors(file, tensors=False)[1].get("statistics") != _fingerprint(model):
            continue
        flow = fastmaf.load(file, device=model.device).eval()
        check_takes_images(flow, file, grey=True, shape=model.own_shape)
        if flow.features != model.flow.features:
            raise fastmaf.CheckpointError(
                f"{file}: expected a flow of {model.flow.features} features, as its model's; found {flow.features}"
            )
        try:
            check_base(flow)
        except ValueError as error:
            raise fastmaf.CheckpointError(f"{file}: {error}") from None
        flows.append(flow)
    return flows if len(flows) == len(model.about.get("images_of_folds", flows)) else []


def _files(run: Path) -> list[Path]:
    return sorted((run / FOLDS_FOLDER).glob("fold-*.safetensors"))


def _owner(file: Path) -> str | None:
    """Returns the fingerprint of the model that a fold model belongs to; None for other files."""
    try:
        return read_tensors(file, tensors=False)[1].get("statistics")
    except (OSError, fastmaf.CheckpointError):
        return None


def _fingerprint(model: InspectionModel) -> str:
    """Returns a hash of the term statistics, which identifies the model that fold models belong to."""
    return hashlib.sha256(model.statistics.mean.cpu().numpy().tobytes()).hexdigest()[:16]
