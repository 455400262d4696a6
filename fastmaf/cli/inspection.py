"""``fastmaf inspect``: finding defects: fitting to good images, calibration, scores and anomaly maps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastmaf.cli import options
from fastmaf.cli.config_file import from_file, reads, resolved, to_toml
from fastmaf.cli.former import ModelArgument
from fastmaf.cli.options import checked_settings, device_named, refuse
from fastmaf.cli.output import say, say_aside, say_json, say_or_aside

if TYPE_CHECKING:
    from fastmaf.inspection.calibration import Calibration

app = typer.Typer(no_args_is_help=True, help="Find defects in images of any object, from good images alone.")


def _fit_and_recipe() -> tuple[Callable[..., None], type]:
    from fastmaf.inspection.recipe import Recipe

    return fit, Recipe


@app.command()
def fit(
    context: typer.Context,
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
    features: Annotated[
        str | None,
        typer.Option(
            metavar="efficientnet-lite0",
            help="Use the features of this pretrained network, too; needs fastmaf[features]. Default: from scratch.",
        ),
    ] = None,
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
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue a fit that Ctrl-C interrupted, with the same images and settings."),
    ] = False,
    seed: options.Seed = 0,
    deterministic: options.Deterministic = False,
    skip_bad: options.SkipBad = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            is_eager=True,
            callback=reads(_fit_and_recipe),
            help="TOML or JSON file with options, and settings of the recipe such as rank and folds. Options of the "
            "command line take precedence.",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings as TOML for --config, and do nothing else.")
    ] = False,
    follow_links: options.FollowLinks = False,
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
        if features is not None:
            from fastmaf.inspection.features.extractor import check_name

            check_name(features)
        side = 64 if size == "auto" else int(size)
        recipe = Recipe(**from_file(context), size=side, seed=seed, dequantize=dequantize, logit=logit)
    if print_config:
        paths: Any = {"data": str(data), "out": str(out), "size": size if size == "auto" else side, "budget": budget}
        paths |= {"kind": kind, "features": features}
        say(to_toml(resolved(recipe, **paths, group_by=group_by, keep_folds=keep_folds, skip_bad=skip_bad)))
        return
    from fastmaf.inspection.workflow.fit import fit as run

    settings: Any = {"keep_folds": keep_folds, "resume": resume, "skip_bad": skip_bad, "progress": not quiet}
    sizes: Any = "auto" if size == "auto" else None
    settings |= {"sizes": sizes, "budget": budget, "kind": kind, "features": features, "group_by": group_by}
    result = run(data, out, recipe, **settings, say=say_aside)
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


@app.command()
def score(
    model: options.Model,
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGES", callback=options.existing_images, help=f"Images: {options.IMAGES}"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Output file, .csv or .jsonl. Default: CSV on standard output."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run with the same arguments and model.")
    ] = False,
    json_lines: Annotated[bool, typer.Option("--jsonl", help="Print JSON lines instead of CSV.")] = False,
    overlays: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for anomaly maps over the images, PNG.")
    ] = None,
    maps: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the maps as numbers, 16-bit PNG.")
    ] = None,
    tiff: Annotated[bool, typer.Option("--tiff", help="Write the maps as 32-bit TIFF instead.")] = False,
    watch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            callback=options.existing,
            help="Instead of IMAGES: score the images in a folder, and new ones once they are complete, until Ctrl-C.",
        ),
    ] = None,
    fail_on_anomaly: Annotated[
        bool, typer.Option("--fail-on-anomaly", help="End with exit code 3 if an image is anomalous.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Processes that read images. Default: one per processor; none for few images."
        ),
    ] = None,
    follow_links: options.FollowLinks = False,
    deterministic: options.Deterministic = False,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Score images and classify them as good or anomalous.

    One row an image: anomaly score, p-value, verdict and latency. The exit code is 2 if files could not be read, and 3
    with --fail-on-anomaly if images are anomalous. Several processes, also on several machines, share the images with
    torchrun --nproc-per-node N -m fastmaf inspect score.
    """
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        refuse(f"expected a .csv or .jsonl file for --out; found {out}")
    if tiff and maps is None:
        refuse("--tiff is the format of --maps; found no --maps")
    if resume and out is None:
        refuse("--resume continues a run with --out; found no --out")
    if watch is None and not images:
        refuse("Missing argument 'IMAGES', or --watch DIR")
    if watch is not None and images:
        refuse("--watch scores the images of a folder; found IMAGES, too")
    settings: Any = {
        "out": out,
        "resume": resume,
        "json_lines": json_lines,
        "overlays": overlays,
        "maps": maps,
        "map_suffix": ".tiff" if tiff else ".png",
        "device": device_named(device),
        "workers": workers,
        "stdout": sys.stdout,
        "say": say_aside,
    }
    if watch is not None:
        from fastmaf.inspection.workflow.watch import watch as run_until_stopped

        result = run_until_stopped(model, watch, **settings)
    else:
        from fastmaf.inspection.workflow.score import score_images as run

        result = run(model, images or [], **settings, progress=not quiet)
    if result.interrupted:
        say_aside("stopped")
        raise typer.Exit(130)
    if fail_on_anomaly and result.anomalous:
        raise typer.Exit(3)
    if result.unread:
        raise typer.Exit(2)


@app.command()
def serve(
    model: options.Model,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen at; 0.0.0.0 for all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 for any free one.")] = 8000,
    max_bytes: Annotated[int, typer.Option(min=1, metavar="N", help="Largest image file that is accepted.")] = 32
    * 2**20,
    max_pixels: Annotated[
        int, typer.Option(min=1, metavar="N", help="Largest width x height that is accepted.")
    ] = 25_000_000,
    device: options.Device = "auto",
    verbose: options.Verbose = False,
) -> None:
    """Score images over HTTP, until Ctrl-C.

    POST an image file to /score for its score, p-value and verdict as JSON, with the anomaly map for ?overlay=true. The
    address itself shows a page to drop an image on. Only this machine can reach it unless --host is given.
    """
    from fastmaf.inspection.serve.run import serve as run

    limits: Any = {"max_bytes": max_bytes, "max_pixels": max_pixels}
    run(model, host=host, port=port, **limits, device=device_named(device), say=say_aside)


@app.command("eval", cls=ModelArgument)
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


@app.command()
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


@app.command()
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
