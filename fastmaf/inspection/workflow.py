"""What the commands train, calibrate, recalibrate, choose and export do."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastmaf
from fastmaf.atomic import written_atomically
from fastmaf.capsule.checkpoints import MODEL_FILE, STATE_FILE, previous_of, set_aside
from fastmaf.capsule.data import ImageSet, load_train
from fastmaf.capsule.outputs import ONNX, Output, check_outputs, report, table
from fastmaf.capsule.outputs import model as model_kind
from fastmaf.capsule.results import bits_per_dim
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.fit import Fitted, fit
from fastmaf.inspection.inputs import Unreadable, expand, read_each
from fastmaf.inspection.location import Location
from fastmaf.inspection.members import member_files, remove_members, save_members
from fastmaf.inspection.model import InspectionModel, load_inspection, model_file
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scores import ScoreSettings

LOG_FILE, REPORT_FILE = "training_log.csv", "report.html"
_LOG_COLUMNS = ("step", "nll", "held_out_nll")

Say = Callable[[str], Any]


@fastmaf.torch_defaults()
def train(
    data: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    keep_folds: bool = False,
    skip_bad: bool = False,
    progress: bool = True,
    say: Say = print,
) -> Fitted:
    """Fits an inspection model to the good images of ``data`` and writes model, log and report to ``out``.

    What an earlier run left in ``out`` is set aside as ``*.previous.*``, but for the models of its folds, which go.
    With ``keep_folds`` those of this run are written, so that their ensemble can be judged.

    Raises:
        DataError: the folder or a file in it is not what is needed.
        OutputError: ``out`` holds a file of the name of one that is written, which is none.
        ValueError: a setting does not fit, or there are fewer images than folds.
    """
    from fastmaf.inspection.reporting import training_report

    recipe, out = recipe or Recipe(), Path(out)
    check_outputs(_outputs_of(out, recipe.folds if keep_folds else 0))
    images = load_train(data, size=recipe.size, skip_bad=skip_bad, progress=progress)
    for note in images.notes:
        say(note)
    fitted = fit(images.pixels, recipe, progress=progress)
    model = fitted.model
    own = {
        "version": fastmaf.__version__,
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": fitted.seconds,
        "log": fitted.log,
        "notes": list(images.notes),
        "skipped": [[path.name, reason] for path, reason in images.skipped],
    }
    model.about.update(own)
    out.mkdir(parents=True, exist_ok=True)
    set_aside(out, LOG_FILE, REPORT_FILE)
    model.save(out / MODEL_FILE)
    _write_log(out / LOG_FILE, fitted)
    remove_members(out)
    if keep_folds:
        save_members(out, model, fitted.cross.flows)
    training_report(out / REPORT_FILE, model, images)
    about = model.about
    for line in _decisions(model):
        say(line)
    whitened, whole = about["held_out_nll_of_whitening"], about["held_out_nll"]
    say(
        f"{len(images)} good images; held-out NLL ({recipe.folds} folds) {whole:,.0f} nats, "
        f"{bits_per_dim(whole, recipe.features) + math.log2(255):.3f} bits/dim of 8-bit data"
        f"{' (at most)' if recipe.dequantize else ''}; whitening alone {whitened:,.0f}"
    )
    say(model.calibration.describe())
    say(f"the model is in {out / MODEL_FILE}, a report in {out / REPORT_FILE}")
    return fitted


def _outputs_of(out: Path, folds: int) -> list[Output]:
    """What ``train`` writes, and what it makes of an earlier run's files."""
    kinds = {MODEL_FILE: model_kind("a model"), LOG_FILE: table("a training log", _LOG_COLUMNS), REPORT_FILE: report()}
    outputs = [Output(out / place, kind) for name, kind in kinds.items() for place in (name, previous_of(name))]
    outputs.append(Output(out / STATE_FILE, model_kind("the state of a training run", "state")))
    return outputs + [
        Output(file, model_kind("the model of a fold", "statistics")) for file in member_files(out, folds)
    ]


def _decisions(model: InspectionModel) -> list[str]:
    """What the fit decided by itself, a line each, with the figures that decided it."""
    about, lines = model.about, []
    if tried := about["held_out_nll_of_copies"]:
        nll = ", ".join(f"{copies} {value:,.0f}" for copies, value in tried.items())
        lines.append(f"copies explained, too: {about['recipe']['copies']} (held-out NLL of a fold: {nll})")
    if (plain := about["held_out_nll_without_logit"]) is not None:
        lines.append(f"logit: kept, as asked (held-out NLL of a fold without it: {plain:,.0f})")
    if (nll_with := about["held_out_nll_with_blocks"]) is not None:
        kept = "kept" if about["recipe"]["blocks"] else "left out"
        alone = about["held_out_nll_of_whitening"]
        lines.append(f"blocks: {kept} (held-out NLL: {nll_with:,.0f} with them, {alone:,.0f} without)")
    chosen = {"drawn_auroc": f"score: grain {model.settings.grain:g} (image AUROC on drawn defects: "}
    chosen["drawn_maps"] = f"heat map: {model.location.factors} factors (mean of pixel AUROC and AU-PRO there: "
    for key, text in chosen.items():
        if found := about.get(key):
            lines.append(text + ", ".join(f"{name} {value:.3f}" for name, value in found.items()) + ")")
    return lines


def _write_log(path: Path, fitted: Fitted) -> None:
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_LOG_COLUMNS)
    rows.writerows([row["step"], f"{row['nll']:.10g}", f"{row['held_out_nll']:.10g}"] for row in fitted.log)
    with written_atomically(path) as file:
        file.write(text.getvalue().encode())


@fastmaf.torch_defaults()
def calibrate(model: str | Path, false_alarm: float, confidence: float | None = None) -> Calibration:
    """Sets the false-alarm rate of a model file from the calibration scores that it holds, and returns what follows.

    Raises:
        CalibrationError: a rate or confidence does not fit.
        fastmaf.CheckpointError: the file is no inspection model.
    """
    path = model_file(model)
    loaded = load_inspection(path)
    return _save(path, loaded, loaded.calibration.with_rate(false_alarm, confidence))


@fastmaf.torch_defaults()
def recalibrate(
    model: str | Path,
    arguments: Sequence[str],
    false_alarm: float,
    confidence: float | None = None,
    *,
    skip_bad: bool = False,
    device: str = "cpu",
    progress: bool = True,
    say: Say = print,
) -> Calibration:
    """Replaces the calibration of a model file by the scores of new good images; the flow stays as it is.

    Raises:
        DataError: an argument matches nothing, or a file cannot be read and ``skip_bad`` is not given.
    """
    path = model_file(model)
    loaded = load_inspection(path, device=device)
    images = read_images(arguments, loaded.size, skip_bad=skip_bad, progress=progress, say=say)
    scores = loaded.scores(images.pixels)
    today, source = datetime.now(timezone.utc).date().isoformat(), ", ".join(arguments)
    source = source if len(source) <= 80 else f"{source[:77]}..."
    return _save(path, loaded, Calibration(scores, false_alarm, confidence, "split", None, today, source))


def _save(path: Path, model: InspectionModel, calibration: Calibration) -> Calibration:
    model.with_calibration(calibration).save(path)
    return calibration


@fastmaf.torch_defaults()
def read_images(
    arguments: Sequence[str], size: int, *, skip_bad: bool = False, progress: bool = True, say: Say = print
) -> ImageSet:
    """Reads the images that arguments name; see ``expand``. Labels are empty.

    Raises:
        DataError: an argument matches nothing, a file cannot be read and ``skip_bad`` is not given, or none can.
    """
    from fastmaf.capsule.data import DataError

    found = expand(arguments)
    for note in found.notes:
        say(note)
    pixels, paths = [], []
    for one in tqdm(read_each(found.files, size), total=len(found.files), disable=not progress, leave=False):
        if isinstance(one, Unreadable):
            if not skip_bad:
                raise DataError(one.reason)
            say(f"skipped: {one.reason}")
            continue
        pixels.append(one.pixels)
        paths.append(one.path)
    if not pixels:
        raise DataError(f"none of the {len(found.files)} images could be read")
    return ImageSet(torch.stack(pixels), tuple(paths), ("",) * len(paths))


@fastmaf.torch_defaults()
def choose(
    data: str | Path, *, size: int = 64, draws: int = 3, seed: int = 0, skip_bad: bool = False, progress: bool = True
) -> str:
    """Compares scores and maps on the good images of a folder and on defects drawn onto them; returns it as text."""
    from fastmaf.inspection.choose import choose as judge
    from fastmaf.inspection.choose import explain
    from fastmaf.inspection.choose_location import choose_location, explain_location

    images = load_train(data, size=size, skip_bad=skip_bad, progress=progress)
    recipe = Recipe(size=size, score=ScoreSettings(), location=Location(), seed=seed)
    fitted = fit(images.pixels, recipe, progress=progress)
    scores = judge(images.pixels, fitted.cross, draws=draws, seed=seed, progress=progress)
    places = choose_location(images.pixels, fitted.cross, draws=draws, seed=seed, progress=progress)
    return f"{explain(scores)}\n\n{explain_location(places)}"


@fastmaf.torch_defaults()
def export(model: str | Path, onnx: str | Path, arguments: Sequence[str], *, say: Say = print) -> str:
    """Writes the model as an ONNX graph, checked on the images that ``arguments`` name; returns what was found.

    Raises:
        OutputError: ``onnx`` is the model, one of the images, or another file that is no export.
    """
    from fastmaf.inspection.export import export_onnx

    found = expand(arguments)
    for note in found.notes:
        say(note)
    path = model_file(model)
    check_outputs([Output(Path(onnx), ONNX)], [path, *found.files])
    return export_onnx(load_inspection(path), onnx, found.files).describe()
