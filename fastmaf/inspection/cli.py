"""The everyday commands of inspection: calibrate, recalibrate, score, export, choose."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastmaf.cli_options import (
    AlarmOption,
    DataOption,
    DeviceOption,
    ModelOption,
    QuietOption,
    SeedOption,
    SizeOption,
    SkipOption,
    device_named,
    say,
    say_aside,
)

ModelArgument = Annotated[Path, typer.Argument(help="Model file, or the folder of a training run.")]
PathsArgument = Annotated[
    list[str], typer.Argument(help="Images: files, folders, patterns such as 'in/*.png', or - for a list on stdin.")
]
ConfidenceOption = Annotated[
    float | None,
    typer.Option(
        help="Promise the rate for this calibration set, with this probability, such as 0.95; without it the promise "
        "holds on average over calibration sets."
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    for command in (calibrate, recalibrate, score, export, choose):
        app.command()(command)


def calibrate(
    model: ModelOption = Path("results"),
    false_alarm: AlarmOption = 0.05,
    confidence: ConfidenceOption = None,
) -> None:
    """Set the false-alarm rate: the threshold comes from scores of held-out normals that the model file holds."""
    from fastmaf.inspection.workflow.calibrate import calibrate as run

    say(run(model, false_alarm, confidence).describe())


def recalibrate(
    model: ModelArgument,
    paths: PathsArgument,
    false_alarm: AlarmOption = 0.05,
    confidence: ConfidenceOption = None,
    skip_bad: SkipOption = False,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Take a new threshold from new good images, without training: another camera, light or batch of parts."""
    from fastmaf.inspection.workflow.calibrate import recalibrate as run

    found = run(
        model,
        paths,
        false_alarm,
        confidence,
        skip_bad=skip_bad,
        device=device_named(device),
        progress=not quiet,
        say=say_aside,
    )
    say(found.describe())


def score(
    model: ModelArgument,
    paths: PathsArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where the rows go: .csv, or .jsonl for JSON lines. Default: CSV on stdout."),
    ] = None,
    json_lines: Annotated[bool, typer.Option("--jsonl", help="JSON lines on stdout instead of CSV.")] = False,
    overlays: Annotated[Path | None, typer.Option(help="Folder for heat maps laid over the images, PNG.")] = None,
    maps: Annotated[Path | None, typer.Option(help="Folder for the maps as numbers, 16-bit PNG.")] = None,
    tiff: Annotated[bool, typer.Option("--tiff", help="Maps as 32-bit TIFF instead.")] = False,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Score images: anomaly score, p-value, verdict and latency of each; exit code 2 when files could not be read."""
    from fastmaf.inspection.workflow.score import score as run

    damaged = run(
        model,
        paths,
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


def export(
    model: ModelArgument,
    onnx: Annotated[Path, typer.Option("--onnx", help="The ONNX file to write.")],
    check: Annotated[
        list[str],
        typer.Option("--check", help="Good images to compare both on: files, folders or patterns. At least one."),
    ],
) -> None:
    """Write the model as one ONNX graph from pixels to verdict, unless ONNX Runtime disagrees with fastmaf."""
    from fastmaf.inspection.workflow.export import export as run

    say(run(model, onnx, check, say=say_aside))


def choose(
    data: DataOption,
    size: SizeOption = 64,
    draws: Annotated[int, typer.Option(min=1, help="Defects drawn onto each normal.")] = 3,
    seed: SeedOption = 0,
    skip_bad: SkipOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare scores and heat maps, and their constants, on normals and on defects drawn onto them: no test image is
    read.
    """
    from fastmaf.inspection.workflow.choose import choose as run

    say(run(data, size=size, draws=draws, seed=seed, skip_bad=skip_bad, progress=not quiet, say=say_aside))
