"""What the commands train, calibrate, recalibrate, choose and export do."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastmaf
from fastmaf.images.dataset import DataError, ImageSet, load_train
from fastmaf.images.decode import sentences
from fastmaf.images.listing import count
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.fit import Fitted, fit
from fastmaf.inspection.inputs import Unreadable, expand, read_each
from fastmaf.inspection.location import Location
from fastmaf.inspection.members import member_files, replace_members, save_members
from fastmaf.inspection.model import InspectionModel, is_inspection_model, load_inspection, model_file
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scores import ScoreSettings
from fastmaf.io.atomic import errors_of_staged, keep_previous, previous, replace, staging, sweep, written_atomically
from fastmaf.io.locks import run_lock
from fastmaf.io.outputs import ONNX, Output, check_outputs, report, table
from fastmaf.io.outputs import model as model_kind
from fastmaf.io.run_folder import check_disk, run_folder
from fastmaf.metrics.results import bits_per_dim
from fastmaf.training.checkpoints import MODEL_FILE, STATE_FILE, refuse_unfinished, remove_state
from fastmaf.training.interrupts import interruptible

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

    What an earlier run left in ``out`` stays until all of this one is written, and is kept as ``*.previous.*``, but for
    the models of its folds, which go. With ``keep_folds`` those of this run are written, so that their ensemble can be
    judged. ``out`` is locked meanwhile: a second run is refused.

    Raises:
        DataError: the folder or a file in it is not what is needed, or there are too few images.
        DoesNotFitError: the disk has too little room.
        InUseError: another process or thread is writing a run to ``out``.
        OSError: ``out`` cannot be written to; if a disk is full, what was there stays.
        OutputError: ``out`` holds a file of the name of one that is written, which is none.
        ValueError: a setting does not fit, or ``out`` holds an unfinished run of the other recipe.
    """
    recipe, out = recipe or Recipe(), Path(out)
    with run_folder(out, "training", LOG_FILE, REPORT_FILE):
        check_outputs(_outputs_of(out, recipe.folds if keep_folds else 0))
        refuse_unfinished(out)
        images = load_train(data, size=recipe.size, skip_bad=skip_bad, progress=progress)
        for note in images.notes:
            say(note)
        _check_count(images, recipe)
        check_disk(out, _disk_needed(recipe, keep_folds))
        fitted = fit(images.pixels, recipe, progress=progress)
        fitted.model.about.update(
            version=fastmaf.__version__,
            created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            seconds=fitted.seconds,
            log=fitted.log,
            notes=list(images.notes),
            skipped=[[path.name, reason] for path, reason in images.skipped],
        )
        _write(out, fitted, images, keep_folds)
    model = fitted.model
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
    outputs = [Output(out / place, kind) for name, kind in kinds.items() for place in (name, previous(Path(name)).name)]
    outputs.append(Output(out / STATE_FILE, model_kind("the state of a training run", "state")))
    return outputs + [
        Output(file, model_kind("the model of a fold", "statistics")) for file in member_files(out, folds)
    ]


def _check_count(images: ImageSet, recipe: Recipe) -> None:
    needed = max(recipe.folds, 3)
    if len(images) < needed:
        skipped = f" besides {count(len(images.skipped), 'file')} that cannot be read" if images.skipped else ""
        raise DataError(
            f"{images.paths[0].parent} holds {count(len(images), 'good image')}{skipped}; an inspection model needs at "
            f"least {needed} to be fitted and calibrated on, better some dozens: add images there, or name another "
            "folder with --data"
        )


def _disk_needed(recipe: Recipe, keep_folds: bool) -> int:
    """Returns the bytes of the whitening's factors, which are nearly all of a model, and of those of the folds."""
    factors = 4 * recipe.features * min(recipe.rank, recipe.features)
    return factors * (1 + recipe.folds * keep_folds)


def _write(out: Path, fitted: Fitted, images: ImageSet, keep_folds: bool) -> None:
    """Writes all files of a run, and only then puts them in place of those of an earlier one."""
    from fastmaf.inspection.reporting import training_report

    with staging(out) as new, errors_of_staged(new, out):
        fitted.model.save(new / MODEL_FILE)
        _write_log(new / LOG_FILE, fitted)
        if keep_folds:
            save_members(new, fitted.model, fitted.cross.flows)
        training_report(new / REPORT_FILE, fitted.model, images, name=out.name)
        with interruptible() as stop:  # Ctrl-C now would leave files of two runs beside each other
            files = (MODEL_FILE, LOG_FILE, REPORT_FILE)
            for name in files:
                keep_previous(out / name)
            for name in files:
                replace(new / name, out / name)
            replace_members(new, out)
            remove_state(out)
    if stop.is_set():
        raise KeyboardInterrupt


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
        InUseError: another process or thread is writing to the file.
    """
    with _model_to_change(model, "calibrating") as (path, loaded):
        calibration = loaded.calibration.with_rate(false_alarm, confidence)
        loaded.with_calibration(calibration).save(path)
    return calibration


@contextmanager
def _model_to_change(model: str | Path, doing: str, device: str = "cpu") -> Iterator[tuple[Path, InspectionModel]]:
    """Yields a model and its file, locked against everyone else who would replace it meanwhile."""
    path = model_file(model)
    is_inspection_model(path)  # a missing file is said as such, not as a lock that cannot be taken
    with run_lock(path, doing):
        sweep(path.parent)
        loaded = load_inspection(path, device=device)
        check_disk(path.parent, path.stat().st_size)
        yield path, loaded


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
    with _model_to_change(model, "recalibrating", device) as (path, loaded):
        images = read_images(arguments, loaded.size, skip_bad=skip_bad, progress=progress, say=say)
        scores = loaded.scores(images.pixels)
        today, source = datetime.now(timezone.utc).date().isoformat(), ", ".join(arguments)
        source = source if len(source) <= 80 else f"{source[:77]}..."
        calibration = Calibration(scores, false_alarm, confidence, "split", None, today, source)
        loaded.with_calibration(calibration).save(path)
    return calibration


@fastmaf.torch_defaults()
def read_images(
    arguments: Sequence[str], size: int, *, skip_bad: bool = False, progress: bool = True, say: Say = print
) -> ImageSet:
    """Reads the images that arguments name; see ``expand``. Labels are empty.

    Raises:
        DataError: an argument matches nothing, a file cannot be read and ``skip_bad`` is not given, or none can.
    """
    found = expand(arguments)
    for note in found.notes:
        say(note)
    pixels, paths = [], []
    kinds: Counter[str] = Counter()
    for one in tqdm(read_each(found.files, size), total=len(found.files), disable=not progress, leave=False):
        if isinstance(one, Unreadable):
            if not skip_bad:
                raise DataError(one.reason)
            say(f"skipped: {one.reason}")
            continue
        kinds.update(one.kinds)
        pixels.append(one.pixels)
        paths.append(one.path)
    if not pixels:
        raise DataError(f"none of the {len(found.files)} images could be read")
    notes = tuple(sentences(kinds))
    for note in notes:
        say(note)
    return ImageSet(torch.stack(pixels), tuple(paths), ("",) * len(paths), notes)


@fastmaf.torch_defaults()
def choose(
    data: str | Path,
    *,
    size: int = 64,
    draws: int = 3,
    seed: int = 0,
    skip_bad: bool = False,
    progress: bool = True,
    say: Say = print,
) -> str:
    """Compares scores and maps on the good images of a folder and on defects drawn onto them; returns it as text."""
    from fastmaf.inspection.choose import choose as judge
    from fastmaf.inspection.choose import explain
    from fastmaf.inspection.choose_location import choose_location, explain_location

    recipe = Recipe(size=size, score=ScoreSettings(), location=Location(), seed=seed)
    images = load_train(data, size=size, skip_bad=skip_bad, progress=progress)
    for note in images.notes:
        say(note)
    _check_count(images, recipe)
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
