"""``fastmaf capsule``: the published run on images of capsules, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastmaf.cli import options
from fastmaf.cli.evaluate import evaluate
from fastmaf.cli.options import checked_settings, device_named, refuse, say

if TYPE_CHECKING:
    from fastmaf.capsule.config import TrainConfig

app = typer.Typer(no_args_is_help=True)


@app.command("demo-data")
def demo_data(
    folder: Annotated[Path, typer.Argument(help="New or empty folder.")],
    train: Annotated[int, typer.Option(min=0, help="Number of normal images for training.")] = 243,
    size: Annotated[int, typer.Option(min=32, max=1024, help="Side of the images in pixels.")] = 192,
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
) -> None:
    """Draw a synthetic capsule data set: normal images, five classes of defects, and their masks."""
    from fastmaf.capsule.synthetic import draw_dataset

    draw_dataset(folder, train=train, size=size, seed=seed, progress=not quiet)
    say(f"drew the synthetic capsules into {folder}")


@app.command()
def train(
    context: typer.Context,
    data: options.Data,
    out: options.Out = Path("results"),
    size: options.Size = 64,
    epochs: options.Epochs = 100,
    batch_size: options.BatchSize = 8,
    lr: options.LearningRate = None,
    blocks: options.Blocks = 7,
    hidden: options.Hidden = "512,512",
    order: options.Order = "natural",
    degrees: options.Degrees = "spread",
    masks: options.Masks = "strict",
    levels: options.Levels = None,
    holdout: Annotated[float, typer.Option(help="Share of the normal images held out of training.")] = 0.1,
    guards: Annotated[
        bool | None,
        typer.Option(help="Settings that keep other orders than natural stable. Default: on for those orders."),
    ] = None,
    seed: options.Seed = 0,
    resume: options.Resume = False,
    skip_bad: options.SkipBad = False,
    device: options.Device = "auto",
    cuda_graphs: options.CudaGraphs = True,
    quiet: options.Quiet = False,
) -> None:
    """Train a flow on good images as in the published run (for inspection: fastmaf inspection train)."""
    config = _config(context.params)
    device = device_named(device)
    from fastmaf.capsule.train import train as run

    result = run(
        data, out, config, resume=resume, skip_bad=skip_bad, device=device, graphs=cuda_graphs, progress=not quiet
    )
    if result.interrupted:
        say(f"stopped after {len(result.log)} whole epochs; the model is in {result.model}; --resume continues")
        raise typer.Exit(130)
    if result.log:
        last = result.log[-1]
        validation = "" if last["val_nll"] is None else f", held-out NLL {last['val_nll']:,.0f}"
        bits = f"{last['bits_per_dim']:.3f} bits/dim on [0, 1]"
        say(f"epoch {len(result.log)}: NLL {last['nll']:,.0f} nats{validation}, {bits}")
    say(f"the model is in {result.model}")


@app.command()
def sample(
    model: options.Model = Path("results"),
    out: options.Out = Path("results"),
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="Number of images.")] = 5,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Draw exact samples from a trained model, for the arithmetic of one forward pass each."""
    from fastmaf.capsule.models import load_model
    from fastmaf.capsule.sample import sample as run

    result = run(load_model(model, device=device_named(device)), out, n, seed=seed, progress=not quiet)
    say(f"{n} samples in {result.seconds:.2f} s: {result.files[0].parent}, all in one picture: {result.grid}")


app.command("eval")(evaluate)


@app.command()
def reproduce(
    context: typer.Context,
    data: options.OptionalData = None,
    out: options.Out = Path("results"),
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Default: 100 with --data, 20 on the synthetic set.")
    ] = None,
    size: options.Size = 64,
    batch_size: options.BatchSize = 8,
    lr: options.LearningRate = None,
    blocks: options.Blocks = 7,
    hidden: options.Hidden = "512,512",
    order: options.Order = "natural",
    degrees: options.Degrees = "random",
    masks: options.Masks = "strict",
    holdout: Annotated[
        float | None,
        typer.Option(help="Share of the normal images held out. Default: 0 with --data, 0.1 on the synthetic set."),
    ] = None,
    seed: options.Seed = 0,
    resume: options.Resume = False,
    skip_bad: options.SkipBad = False,
    device: options.Device = "auto",
    cuda_graphs: options.CudaGraphs = True,
    quiet: options.Quiet = False,
) -> None:
    """Repeat the published run (train, sample, evaluate) and print both runs side by side."""
    defaults = {"epochs": 20, "holdout": 0.1} if data is None else {"epochs": 100, "holdout": 0.0}
    config = _config(context.params, **defaults)
    device = device_named(device)
    from fastmaf.capsule.reproduce import reproduce as run

    result = run(
        out,
        config,
        data=data,
        resume=resume,
        skip_bad=skip_bad,
        device=device,
        graphs=cuda_graphs,
        progress=not quiet,
        say=say,
    )
    if result is None:
        raise typer.Exit(130)
    say(f"\n{result.table}\n\neverything is in {out}")


def _config(given: dict[str, Any], **defaults: Any) -> TrainConfig:
    """Returns the settings of a run from the options of its command; options that are None take ``defaults``.

    Guards are on by default for every order but the natural one.
    """
    from dataclasses import fields

    from fastmaf.capsule.config import GUARDED, TrainConfig

    given = {name: value for name, value in given.items() if value is not None}
    if given.get("guards", given["order"] != "natural"):
        defaults |= GUARDED
    values = {**defaults, **given, "hidden_features": _hidden(given["hidden"])}
    with checked_settings():
        config = TrainConfig(
            **{field.name: values[field.name] for field in fields(TrainConfig) if field.name in values}
        )
    if config.masks != "strict":
        say(
            f"--masks {config.masks}: the output mask of the published run compares degrees with >= instead of >, so "
            "that some outputs depend on their own input. The log-determinant is wrong there: what is reported as NLL "
            "is no density, and the model cannot sample."
        )
    return config


def _hidden(text: str) -> tuple[int, ...]:
    units = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in units):
        refuse(f"expected the units of each hidden layer separated by commas, such as 512,512; found {text!r}")
    return tuple(map(int, units))
