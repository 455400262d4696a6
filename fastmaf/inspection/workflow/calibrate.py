"""``fastmaf inspect calibrate`` and ``recalibrate``: set the threshold of a model file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import fastmaf
from fastmaf.inspection.calibration import Calibration, CalibrationError
from fastmaf.inspection.interface import AnomalyModel, scores_of
from fastmaf.inspection.model import is_inspection_model, load_inspection, model_file
from fastmaf.inspection.workflow.inputs import Say, read_images
from fastmaf.io.atomic import sweep
from fastmaf.io.locks import run_lock
from fastmaf.io.run_folder import check_disk
from fastmaf.io.wording import errors_of


@fastmaf.torch_defaults()
def calibrate(
    model: str | Path, false_alarm: float, confidence: float | None = None, *, say: Say = print
) -> Calibration:
    """Sets the false-alarm rate of a model file, using the calibration scores that it holds.

    Args:
        model: the file, or the folder of a run.
        false_alarm, confidence: as in ``Calibration``.
        say: receives the change of the threshold.

    Raises:
        CalibrationError: the rate or the confidence is out of range.
        fastmaf.CheckpointError: the file is not an inspection model.
        InUseError: another process or thread is writing to the file.
    """
    with _locked_model(model, "calibrating") as (path, loaded):
        calibration = loaded.calibration.with_rate(false_alarm, confidence)
        loaded.with_calibration(calibration).save(path)
    _say_change(loaded.calibration, calibration, say)
    return calibration


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
    """Replaces the calibration scores of a model file by those of new good images; the flow is unchanged.

    Args:
        arguments: the images; see ``expand``.
        false_alarm, confidence: as in ``Calibration``.

    Raises:
        CalibrationError: the rate or the confidence is out of range, or a score is NaN.
        DataError: an argument matches nothing, or a file cannot be read and ``skip_bad`` is False.
    """
    with _locked_model(model, "recalibrating", device) as (path, loaded):
        pixels, shapes = read_images(arguments, loaded.size, skip_bad=skip_bad, progress=progress, say=say)
        today, source = datetime.now(timezone.utc).date().isoformat(), ", ".join(arguments)
        source = source if len(source) <= 80 else f"{source[:77]}..."
        scores = scores_of(loaded, pixels, shapes)
        with errors_of(path, CalibrationError):
            calibration = Calibration(scores, false_alarm, confidence, "split", None, today, source)
        loaded.with_calibration(calibration).save(path)
    _say_change(loaded.calibration, calibration, say)
    return calibration


def _say_change(before: Calibration, after: Calibration, say: Say) -> None:
    if before.threshold != after.threshold:
        say(f"threshold changed from {before.threshold:.6g} to {after.threshold:.6g}")


@contextmanager
def _locked_model(model: str | Path, doing: str, device: str = "cpu") -> Iterator[tuple[Path, AnomalyModel]]:
    """Yields a model file and its model while the file is locked against other writers."""
    path = model_file(model)
    is_inspection_model(path)  # reports a missing file as such, instead of as a lock that cannot be taken
    with run_lock(path, doing):
        sweep(path.parent)
        loaded = load_inspection(path, device=device)
        check_disk(path.parent, path.stat().st_size)
        yield path, loaded
