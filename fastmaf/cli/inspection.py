"""``fastmaf inspect``: finding defects: fitting to good images, calibration, scores and anomaly maps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastmaf.cli import options
from fastmaf.cli.former import ModelArgument
from fastmaf.cli.options import checked_settings, device_named, refuse
from fastmaf.cli.output import say, say_aside, say_json, say_or_aside

if TYPE_CHECKING:
    from fastmaf.inspection.calibration import Calibration

app = typer.Typer(no_args_is_help=True, help="Find defects in images of any object, from good images alone.")


@app.command()
def fit(
    data: options.TrainData,
    out: options.Out = Path("results"),
    size: Annotated[
        str,
        typer.Option(
            callback=options.size_or_auto,
            metavar="auto|N",
            help="Side of the square images in pixels; auto tries 64, 128 and 256, as far as images and --budget go.",
        ),
    ] = "64",
    budget: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Time for the models of --size auto; from 300 on, 256 too.")
    ] = 120,
    kind: Annotated[
        str,
        typer.Option(
            callback=options.inspected_kind,
            metavar="auto|object|texture",
            help="An object, whose parts have a fixed place or shape; a texture, which looks the same everywhere; or "
            "what the good images, and synthetic defects on them, call for.",
        ),
    ] = "auto",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Spread each 8-bit value evenly over its bin for fitting.")
    ] = False,
    logit: Annotated[
        float | None,
        typer.Option(metavar="ALPHA", help="Apply a logit with this alpha, such as 0.05, to the pixels first."),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|REGEX|CSV",
            help="Images taken together: 'folder', an expression for their names such as '^part(\\d+)', or a .csv with "
            "columns file and group. Whole groups are held out.",
        ),
    ] = None,
    keep_folds: Annotated[
        bool, typer.Option("--keep-folds", help="Keep the fold models; eval then reports their mean, too.")
    ] = False,
    seed: options.Seed = 0,
    skip_bad: options.SkipBad = False,
    explain: options.Explain = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Fit a model to good images, on the CPU, and calibrate it.

    Writes model.safetensors, training_log.csv and report.html.
    """
    from fastmaf.inspection.recipe import Recipe

    with checked_settings():
        recipe = Recipe(size=64 if size == "auto" else int(size), seed=seed, dequantize=dequantize, logit=logit)
    from fastmaf.inspection.workflow.fit import fit as run

    settings: Any = {"keep_folds": keep_folds, "skip_bad": skip_bad, "progress": not quiet}
    sizes: Any = "auto" if size == "auto" else None
    choices: Any = {"sizes": sizes, "budget": budget, "kind": kind}
    result = run(data, out, recipe, group_by=group_by, **choices, **settings, say=say_aside)
    say_or_aside(as_json)(result.describe(explain))
    if as_json:
        say_json(result.summary())


@app.command(cls=ModelArgument)
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


@app.command()
def recalibrate(
    model: options.Model,
    images: options.Images,
    false_alarm: options.FalseAlarm = 0.05,
    confidence: options.Confidence = None,
    skip_bad: options.SkipBad = False,
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


@app.command()
def score(
    model: options.Model,
    images: options.Images,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Output file, .csv or .jsonl. Default: CSV on standard output."),
    ] = None,
    json_lines: Annotated[bool, typer.Option("--jsonl", help="Print JSON lines instead of CSV.")] = False,
    overlays: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for anomaly maps over the images, PNG.")
    ] = None,
    maps: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the maps as numbers, 16-bit PNG.")
    ] = None,
    tiff: Annotated[bool, typer.Option("--tiff", help="Write the maps as 32-bit TIFF instead.")] = False,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Score images and classify them as good or anomalous.

    One row an image: anomaly score, p-value, verdict and latency. The exit code is 2 if files could not be read.
    """
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        refuse(f"expected a .csv or .jsonl file for --out; found {out}")
    if tiff and maps is None:
        refuse("--tiff is the format of --maps; found no --maps")
    from fastmaf.inspection.workflow.score import score as run

    damaged = run(
        model,
        images,
        out=out,
        json_lines=json_lines,
        overlays=overlays,
        maps=maps,
        map_suffix=".tiff" if tiff else ".png",
        device=device_named(device),
        progress=not quiet,
        stdout=sys.stdout,
        say=say_aside,
    )
    if damaged:
        raise typer.Exit(2)


@app.command("eval", cls=ModelArgument)
def evaluate(
    data: options.TestData,
    model: options.Model = Path("results"),
    out: options.Out = Path("results"),
    skip_bad: options.SkipBad = False,
    seed: options.Seed = 0,
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


@app.command()
def export(
    model: options.Model,
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE", help="The ONNX file to write.")],
    check: options.CheckImages,
    verbose: options.Verbose = False,
) -> None:
    """Write the model as an ONNX graph from pixels to verdict.

    It is written only if ONNX Runtime agrees with fastmaf on the images of --check.
    """
    from fastmaf.inspection.workflow.export import export as run

    say(run(model, onnx, check, say=say_aside))


@app.command()
def choose(
    data: options.TrainData,
    size: options.Size = 64,
    draws: Annotated[int, typer.Option(min=1, metavar="N", help="Defects drawn onto each good image.")] = 3,
    seed: options.Seed = 0,
    skip_bad: options.SkipBad = False,
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
