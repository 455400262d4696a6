"""``fastmaf capsule demo-data``, ``sample`` and ``eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastmaf.cli import options
from fastmaf.cli.options import device_named, share
from fastmaf.cli.output import say, say_json, say_or_aside


def demo_data(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New or empty folder.")],
    train: Annotated[int, typer.Option(min=0, metavar="N", help="Number of good images for training.")] = 243,
    size: Annotated[int, typer.Option(min=32, max=1024, metavar="N", help="Side of the images in pixels.")] = 192,
    seed: options.Seed = 0,
    deterministic: options.Deterministic = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Draw a synthetic set of capsule images.

    It holds good images for training and testing, five classes of defects, and their masks.
    """
    from fastmaf.capsule.synthetic import draw_dataset

    draw_dataset(folder, train=train, size=size, seed=seed, progress=not quiet)
    say(f"drew the synthetic capsules into {folder}")


def sample(
    model: options.Model = Path("results"),
    out: options.Out = Path("results"),
    n: Annotated[int, typer.Option("-n", "--number", min=1, metavar="N", help="Number of images.")] = 5,
    seed: options.Seed = 0,
    deterministic: options.Deterministic = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Draw exact samples from a trained model."""
    from fastmaf.capsule.models import load_model
    from fastmaf.capsule.sample import sample as run

    result = run(load_model(model, device=device_named(device)), out, n, seed=seed, progress=not quiet)
    say_or_aside(as_json)(result.describe())
    if as_json:
        say_json(result.summary())


def evaluate(
    data: options.TestData,
    model: options.Model = Path("results"),
    out: options.Out = Path("results"),
    false_alarm: Annotated[
        float,
        typer.Option(
            callback=share, metavar="RATE", help="False-alarm rate of the threshold from held-out good images."
        ),
    ] = 0.05,
    skip_bad: options.SkipBad = False,
    follow_links: options.FollowLinks = False,
    seed: options.Seed = 0,
    deterministic: options.Deterministic = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Score a labelled test set by negative log-likelihood.

    Writes scores.csv, metrics.json, a histogram and an ROC curve.
    """
    from fastmaf.capsule.evaluate import evaluate as run
    from fastmaf.capsule.models import load_model
    from fastmaf.inspection.model import is_inspection_model
    from fastmaf.metrics.result_files import format_table, to_json

    if is_inspection_model(model):
        raise ValueError(f"{model} is an inspection model: use 'fastmaf inspect eval'")
    loaded = load_model(model, device=device_named(device))
    evaluation = run(loaded, data, out, false_alarm=false_alarm, skip_bad=skip_bad, seed=seed, progress=not quiet)
    tell = say_or_aside(as_json)
    tell(format_table(evaluation))
    tell(f"scores, metrics and figures are in {out}")
    if as_json:
        say_json(to_json(evaluation, {"model": loaded.path.name}))
