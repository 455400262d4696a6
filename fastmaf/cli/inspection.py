"""``fastmaf inspection``: training on good images, calibration, scores and anomaly maps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastmaf.cli import options
from fastmaf.cli.evaluate import evaluate
from fastmaf.cli.options import checked_settings, device_named, refuse, say, say_aside

app = typer.Typer(no_args_is_help=True)


@app.command()
def train(
    data: options.Data,
    out: options.Out = Path("results"),
    size: options.Size = 64,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Spread each 8-bit value evenly over its bin for fitting.")
    ] = False,
    logit: Annotated[
        float | None, typer.Option(help="Apply a logit with this alpha, such as 0.05, to the pixels first.")
    ] = None,
    keep_folds: Annotated[
        bool, typer.Option("--keep-folds", help="Keep the fold models; eval then reports their mean, too.")
    ] = False,
    seed: options.Seed = 0,
    skip_bad: options.SkipBad = False,
    quiet: options.Quiet = False,
) -> None:
    """Fit whitening and local blocks to good images, on the CPU, with a calibrated score and anomaly maps."""
    from fastmaf.inspection.recipe import Recipe

    with checked_settings():
        recipe = Recipe(size=size, seed=seed, dequantize=dequantize, logit=logit)
    from fastmaf.inspection.workflow.fit import fit as run

    run(data, out, recipe, keep_folds=keep_folds, skip_bad=skip_bad, progress=not quiet, say=say)


@app.command()
def calibrate(
    model: options.Model = Path("results"),
    false_alarm: options.FalseAlarm = 0.05,
    confidence: options.Confidence = None,
) -> None:
    """Set the threshold for a false-alarm rate, from the scores of held-out normal images in the model file."""
    from fastmaf.inspection.workflow.calibrate import calibrate as run

    say(run(model, false_alarm, confidence).describe())


@app.command()
def recalibrate(
    model: options.ModelArgument,
    images: options.Images,
    false_alarm: options.FalseAlarm = 0.05,
    confidence: options.Confidence = None,
    skip_bad: options.SkipBad = False,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Set the threshold from new good images without training, for another camera, light or batch of parts."""
    from fastmaf.inspection.workflow.calibrate import recalibrate as run

    settings = (model, images, false_alarm, confidence)
    done = run(*settings, skip_bad=skip_bad, device=device_named(device), progress=not quiet, say=say_aside)
    say(done.describe())


@app.command()
def score(
    model: options.ModelArgument,
    images: options.Images,
    out: Annotated[
        Path | None, typer.Option("--out", help="Output file, .csv or .jsonl. Default: CSV on standard output.")
    ] = None,
    json_lines: Annotated[bool, typer.Option("--jsonl", help="Print JSON lines instead of CSV.")] = False,
    overlays: Annotated[Path | None, typer.Option(help="Folder for anomaly maps over the images, PNG.")] = None,
    maps: Annotated[Path | None, typer.Option(help="Folder for the maps as numbers, 16-bit PNG.")] = None,
    tiff: Annotated[bool, typer.Option("--tiff", help="Write the maps as 32-bit TIFF instead.")] = False,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Score images: anomaly score, p-value, verdict and latency. The exit code is 2 if files could not be read."""
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


app.command("eval")(evaluate)


@app.command()
def export(
    model: options.ModelArgument,
    onnx: Annotated[Path, typer.Option("--onnx", help="The ONNX file to write.")],
    check: options.CheckImages,
) -> None:
    """Write the model as an ONNX graph from pixels to verdict, if ONNX Runtime agrees with fastmaf on --check."""
    from fastmaf.inspection.workflow.export import export as run

    say(run(model, onnx, check, say=say_aside))


@app.command()
def choose(
    data: options.Data,
    size: options.Size = 64,
    draws: Annotated[int, typer.Option(min=1, help="Defects drawn onto each normal image.")] = 3,
    seed: options.Seed = 0,
    skip_bad: options.SkipBad = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare scores and anomaly maps on normal images and on defects drawn onto them, without any test image."""
    from fastmaf.inspection.recipe import Recipe

    with checked_settings():
        Recipe(size=size)
    from fastmaf.inspection.workflow.choose import choose as run

    say(run(data, size=size, draws=draws, seed=seed, skip_bad=skip_bad, progress=not quiet, say=say_aside).describe())
