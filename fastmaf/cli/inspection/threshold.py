"""``fastmaf inspect calibrate`` and ``recalibrate``: the threshold of scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastmaf.cli import options
from fastmaf.cli.options import device_named
from fastmaf.cli.output import say, say_aside, say_json

if TYPE_CHECKING:
    from fastmaf.inspection.calibration import Calibration


def calibrate(
    model: options.Model = Path("results"),
    false_alarm: options.FalseAlarm = 0.05,
    confidence: options.Confidence = None,
    explain: options.Explain = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Set the threshold for a false-alarm rate.

    It is taken from the scores of held-out good images, which the model file holds.
    """
    from fastmaf.inspection.workflow.calibrate import calibrate as run

    _say_calibration(run(model, false_alarm, confidence, say=say_aside), explain, as_json)


def recalibrate(
    model: options.Model,
    images: options.Images,
    false_alarm: options.FalseAlarm = 0.05,
    confidence: options.Confidence = None,
    deterministic: options.Deterministic = False,
    skip_bad: options.SkipBad = False,
    follow_links: options.FollowLinks = False,
    device: options.Device = "auto",
    explain: options.Explain = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Set the threshold from new good images.

    For another camera, light or batch of parts; the flow stays as it is.
    """
    from fastmaf.inspection.workflow.calibrate import recalibrate as run

    settings = (model, images, false_alarm, confidence)
    done = run(*settings, skip_bad=skip_bad, device=device_named(device), progress=not quiet, say=say_aside)
    _say_calibration(done, explain, as_json)


def _say_calibration(calibration: Calibration, explain: bool, as_json: bool) -> None:
    if as_json:
        say_json(calibration.summary())
    else:
        say(calibration.describe(explain))
