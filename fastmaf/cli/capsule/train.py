"""``fastmaf capsule train`` and ``reproduce``, which has most of its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastmaf.cli import options
from fastmaf.cli.options import LARGEST, checked_settings, device_named, options_of, refuse
from fastmaf.cli.output import say_aside, say_json, say_or_aside

if TYPE_CHECKING:
    from fastmaf.capsule.config import TrainConfig


def _hidden(text: str) -> tuple[int, ...]:
    units = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in units):
        refuse(f"expected the units of each hidden layer separated by commas, such as 512,512; found {text!r}")
    return tuple(map(int, units))


def train(
    context: typer.Context,
    data: options.TrainData,
    out: options.Out = Path("results"),
    size: options.Size = 64,
    epochs: Annotated[
        int, typer.Option(min=1, max=LARGEST, metavar="N", help="Passes over the training images.")
    ] = 100,
    batch_size: Annotated[int, typer.Option(min=1, max=LARGEST, metavar="N", help="Images per step.")] = 8,
    lr: Annotated[
        float | None, typer.Option(metavar="RATE", help="Learning rate of Adam. Default: 1e-4, or 2e-5 with guards.")
    ] = None,
    blocks: Annotated[int, typer.Option(min=1, max=LARGEST, metavar="N", help="Blocks of the flow.")] = 7,
    hidden_features: Annotated[
        str,
        typer.Option(
            "--hidden", callback=_hidden, metavar="N,N", help="Units of each hidden layer, separated by commas."
        ),
    ] = "512,512",
    order: Annotated[
        Literal["natural", "alternate", "random"],
        typer.Option(help="Order of the dimensions: the same in all blocks, reversed in every second one, or random."),
    ] = "natural",
    degrees: Annotated[
        Literal["spread", "random", "cyclic"], typer.Option(help="Degrees of the hidden units.")
    ] = "spread",
    masks: Annotated[
        Literal["strict", "published", "reference"],
        typer.Option(help="Output masks: strict, or the leaky ones of the published run, once called reference."),
    ] = "strict",
    levels: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Maximum number of distinct hidden degrees: fewer dependent steps when sampling."
        ),
    ] = None,
    holdout: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the good images held out of training.")
    ] = 0.1,
    guards: Annotated[
        bool | None,
        typer.Option(help="Settings that keep other orders than natural stable. Default: on for those orders."),
    ] = None,
    seed: options.Seed = 0,
    deterministic: options.Deterministic = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint in the output folder.")
    ] = False,
    skip_bad: options.SkipBad = False,
    follow_links: options.FollowLinks = False,
    device: options.Device = "auto",
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help="On a GPU, replay training steps as CUDA graphs.")
    ] = True,
    shard_optimizer: Annotated[
        bool,
        typer.Option(
            "--shard-optimizer/--no-shard-optimizer",
            help="With several processes, split the optimiser's state among them: for models that do not fit.",
        ),
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a flow on good images, as in the published run.

    To find defects, use fastmaf inspect fit: it is faster and finds more of them. Several processes train together
    with torchrun --nproc-per-node N -m fastmaf capsule train.
    """
    config, settings = _settings(context.params)
    from fastmaf.capsule.train import train as run
    from fastmaf.training.processes import is_first

    result = run(data, out, config, shard_optimizer=shard_optimizer, **settings)
    if is_first():
        say_or_aside(as_json)(result.describe())
    if as_json and is_first():
        say_json(result.summary())
    if result.interrupted:
        raise typer.Exit(130)


@options_of(train, without=["shard_optimizer"], degrees="random")
def reproduce(
    context: typer.Context,
    out: Path,
    data: options.OptionalData = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST,
            metavar="N",
            help="Passes over the training images. Default: 100 with --data, 20 on the synthetic set.",
        ),
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the good images held out of training. Default: 0 with --data, 0.1 on the synthetic set.",
        ),
    ] = None,
    **_: Any,
) -> None:
    """Repeat the published run, beside fastmaf's own recipe.

    Trains, samples and evaluates with the published recipe, then fits an inspection model to the same images, and
    compares both: on the terminal, and in report.html.
    """
    defaults = {"epochs": 20, "holdout": 0.1} if data is None else {"epochs": 100, "holdout": 0.0}
    config, settings = _settings(context.params, **defaults)
    from fastmaf.reproduction import reproduce as run

    tell = say_or_aside(context.params["as_json"])
    result = run(out, config, data=data, say=tell, **settings)
    if result is None:
        raise typer.Exit(130)
    tell(f"\n{result.table}\n\neverything is in {out}; begin with {out / 'report.html'}")
    if context.params["as_json"]:
        say_json(result.summary())


def _settings(given: dict[str, Any], **defaults: Any) -> tuple[TrainConfig, dict[str, Any]]:
    """Returns the settings of a run, and how to run it, from the options; those that are None take ``defaults``.

    Guards are on by default for every order but the natural one.
    """
    from dataclasses import fields

    from fastmaf.capsule.config import GUARDED, TrainConfig

    given = {name: value for name, value in given.items() if value is not None}
    if given.get("guards", given["order"] != "natural"):
        defaults |= GUARDED
    values = defaults | given
    with checked_settings():
        config = TrainConfig(
            **{field.name: values[field.name] for field in fields(TrainConfig) if field.name in values}
        )
    if config.masks != "strict":
        say_aside(
            f"--masks {config.masks}: the output mask of the published run compares degrees with >= instead of >, so "
            "that some outputs depend on their own input. The log-determinant is wrong there: what is reported as NLL "
            "is no density, and the model cannot sample."
        )
    return config, {
        "resume": given["resume"],
        "skip_bad": given["skip_bad"],
        "device": device_named(given["device"]),
        "graphs": given["cuda_graphs"],
        "progress": not given["quiet"],
    }
