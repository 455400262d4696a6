"""``fastmaf eval``, which both groups have: the model file determines the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastmaf.cli import options
from fastmaf.cli.options import device_named, refuse, say, share


def evaluate(
    data: options.Data,
    model: options.Model = Path("results"),
    out: options.Out = Path("results"),
    false_alarm: Annotated[
        float | None,
        typer.Option(callback=share, help="Rate of the held-out threshold of a capsule model. Default: 0.05."),
    ] = None,
    skip_bad: options.SkipBad = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Score a labelled test set: scores.csv, metrics.json, and report.html or a histogram and an ROC curve."""
    from fastmaf.inspection.model import is_inspection_model

    if is_inspection_model(model):
        if false_alarm is not None:
            refuse("--false-alarm: an inspection model has its own rate, which fastmaf calibrate sets")
        from fastmaf.inspection.workflow.evaluate import evaluate as inspect

        name = device_named(device)
        inspect(model, data, out, device=name, skip_bad=skip_bad, seed=seed, progress=not quiet, say=say)
        return
    from fastmaf.capsule.evaluate import evaluate as run
    from fastmaf.capsule.models import load_model
    from fastmaf.metrics.result_files import format_table

    loaded = load_model(model, device=device_named(device))
    rate = 0.05 if false_alarm is None else false_alarm
    evaluation = run(loaded, data, out, false_alarm=rate, skip_bad=skip_bad, seed=seed, progress=not quiet)
    say(format_table(evaluation))
    say(f"scores, metrics and figures are in {out}")
