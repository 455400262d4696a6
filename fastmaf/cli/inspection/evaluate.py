"""``fastmaf inspect eval``, ``export`` and ``choose``: how good a model is, its graph, and comparisons beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastmaf.cli import options
from fastmaf.cli.options import checked_settings, device_named
from fastmaf.cli.output import say, say_aside, say_json, say_or_aside


def evaluate(
    data: options.TestData,
    model: options.Model = Path("results"),
    out: options.Out = Path("results"),
    skip_bad: options.SkipBad = False,
    follow_links: options.FollowLinks = False,
    seed: options.Seed = 0,
    deterministic: options.Deterministic = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Score a labelled test set, beside simple baselines.

    Writes scores.csv, metrics.json and report.html.
    """
    from fastmaf.inspection.workflow.evaluate import evaluate as run
    from fastmaf.inspection.workflow.evaluate import outputs_of

    settings: Any = {"device": device_named(device), "skip_bad": skip_bad, "seed": seed, "progress": not quiet}
    result = run(model, data, out, **settings, say=say_aside)
    tell = say_or_aside(as_json)
    tell(result.describe())
    tell(f"written to {out}: {', '.join(output.path.name for output in outputs_of(out))}")
    if as_json:
        say_json(result.to_json())


def export(
    model: options.Model,
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE", help="The ONNX file to write.")],
    check: options.CheckImages,
    follow_links: options.FollowLinks = False,
    verbose: options.Verbose = False,
) -> None:
    """Write the model as an ONNX graph from pixels to verdict.

    It is written only if ONNX Runtime agrees with fastmaf on the images of --check.
    """
    from fastmaf.inspection.workflow.export import export as run

    say(run(model, onnx, check, say=say_aside))


def choose(
    data: options.TrainData,
    size: options.Size = 64,
    draws: Annotated[int, typer.Option(min=1, metavar="N", help="Defects drawn onto each good image.")] = 3,
    seed: options.Seed = 0,
    deterministic: options.Deterministic = False,
    skip_bad: options.SkipBad = False,
    follow_links: options.FollowLinks = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Compare scores and anomaly maps on synthetic defects.

    The defects are drawn onto the good images; no test image is read.
    """
    from fastmaf.inspection.recipe import Recipe

    with checked_settings():
        Recipe(size=size)
    from fastmaf.inspection.workflow.choose import choose as run

    result = run(data, size=size, draws=draws, seed=seed, skip_bad=skip_bad, progress=not quiet, say=say_aside)
    if as_json:
        say_json(result.to_json())
    else:
        say(result.describe())
