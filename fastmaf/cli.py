"""The ``fastmaf`` command."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from fastmaf.cli_options import (
    AlarmOption,
    BatchOption,
    BlocksOption,
    DataOption,
    Degrees,
    DeviceOption,
    EpochsOption,
    GraphsOption,
    HiddenOption,
    LevelsOption,
    Masks,
    MasksOption,
    ModelOption,
    Order,
    OrderOption,
    OutOption,
    QuietOption,
    RateOption,
    RecipeName,
    ResumeOption,
    SeedOption,
    SizeOption,
    SkipOption,
    device_named,
    error_text,
    say,
    say_aside,
)
from fastmaf.inspection.cli import register
from fastmaf.io.atomic import STDOUT, write_errors

app = typer.Typer(
    help="Masked autoregressive flows: train on good images, sample, find defects by negative log-likelihood.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command("demo-data")
def demo_data(
    folder: Annotated[Path, typer.Argument(help="New or empty folder.")],
    train: Annotated[int, typer.Option(help="Normal images to train on.")] = 243,
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 192,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Draw a synthetic capsule data set: normals, five classes of defects, and their masks."""
    from fastmaf.capsule.synthetic import draw_dataset

    draw_dataset(folder, train=train, size=size, seed=seed, progress=not quiet)
    say(f"drew the synthetic capsules into {folder}")


@app.command()
def train(
    context: typer.Context,
    data: DataOption,
    recipe: Annotated[
        RecipeName,
        typer.Option(
            help="reference: a MAF as in the published run. inspection: whitening and local blocks, with a calibrated "
            "score and heat maps, on the CPU; of the options below it takes --size, --seed, --skip-bad, --quiet and "
            "those that name it."
        ),
    ] = RecipeName.reference,
    out: OutOption = Path("results"),
    size: SizeOption = 64,
    epochs: EpochsOption = 100,
    batch_size: BatchOption = 8,
    lr: RateOption = None,
    blocks: BlocksOption = 7,
    hidden: HiddenOption = "512,512",
    order: OrderOption = Order.natural,
    degrees: Annotated[Degrees, typer.Option(help="Degrees of the hidden units.")] = Degrees.spread,
    masks: MasksOption = Masks.strict,
    levels: LevelsOption = None,
    holdout: Annotated[float, typer.Option(help="Share of the normals kept out for validation and thresholds.")] = 0.1,
    guards: Annotated[
        bool | None,
        typer.Option(
            help="What keeps mixed orders stable (see the README); by default on unless the order is natural."
        ),
    ] = None,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    skip_bad: SkipOption = False,
    device: DeviceOption = "auto",
    cuda_graphs: GraphsOption = True,
    keep_folds: Annotated[
        bool, typer.Option("--keep-folds", help="inspection: keep the folds' models, whose mean eval then judges, too.")
    ] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="inspection: fit to 8-bit values spread over their bins.")
    ] = False,
    logit: Annotated[
        float | None,
        typer.Option(help="inspection: alpha of a logit of the pixels, such as 0.05; by default none."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Train a flow on the good images of a folder."""
    given = _given(context)
    if recipe is RecipeName.inspection:
        _refuse(given - _SHARED - _INSPECTION, "inspection")
        from fastmaf.inspection.recipe import Recipe
        from fastmaf.inspection.workflow import train as inspect

        settings = Recipe(size=size, seed=seed, dequantize=dequantize, logit=logit)
        inspect(data, out, settings, keep_folds=keep_folds, skip_bad=skip_bad, progress=not quiet, say=say)
        return
    _refuse(given & _INSPECTION, "reference")
    from fastmaf.capsule.config import TrainConfig
    from fastmaf.capsule.train import train as run

    config = TrainConfig(
        size=size,
        epochs=epochs,
        batch_size=batch_size,
        blocks=blocks,
        hidden_features=_hidden(hidden),
        order=order.value,
        degrees=degrees.value,
        masks=masks.value,
        levels=levels,
        holdout=holdout,
        seed=seed,
        **_guards_and_rate(order, guards, lr),
    )
    _say_masks(masks)
    result = run(
        data,
        out,
        config,
        resume=resume,
        skip_bad=skip_bad,
        device=device_named(device),
        graphs=cuda_graphs,
        progress=not quiet,
    )
    if result.interrupted:
        say(f"stopped after {len(result.log)} whole epochs; the model is in {result.model}; --resume goes on")
        raise typer.Exit(130)
    if result.log:
        last = result.log[-1]
        validation = "" if last["val_nll"] is None else f", held-out NLL {last['val_nll']:,.0f}"
        bits = f"{last['bits_per_dim']:.3f} bits/dim on [0, 1]"
        say(f"epoch {len(result.log)}: NLL {last['nll']:,.0f} nats{validation}, {bits}")
    say(f"the model is in {result.model}")


_SHARED = {"data", "recipe", "out", "size", "seed", "skip_bad", "quiet"}
_INSPECTION = {"keep_folds", "dequantize", "logit"}


def _refuse(foreign: set[str], recipe: str) -> None:
    """Refuses options that a recipe would not heed."""
    if foreign:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(foreign))
        raise typer.BadParameter(f"--recipe {recipe} does not take {names}")


def _given(context: typer.Context) -> set[str]:
    """Returns the options that stand on the command line, as their parameters are called."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


@app.command()
def sample(
    model: ModelOption = Path("results"),
    out: OutOption = Path("results"),
    n: Annotated[int, typer.Option("-n", "--number", help="How many images.")] = 5,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Draw images from a trained model, exactly, at about the price of one forward pass."""
    from fastmaf.capsule.models import load_model
    from fastmaf.capsule.sample import sample as run

    result = run(load_model(model, device=device_named(device)), out, n, seed=seed, progress=not quiet)
    say(f"{n} samples in {result.seconds:.2f} s: {result.files[0].parent}, all in one picture: {result.grid}")


@app.command("eval")
def evaluate(
    context: typer.Context,
    data: DataOption,
    model: ModelOption = Path("results"),
    out: OutOption = Path("results"),
    false_alarm: AlarmOption = 0.05,
    skip_bad: SkipOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Score a labelled test set: scores.csv, metrics.json, histogram and ROC curve, or report.html."""
    from fastmaf.inspection.model import is_inspection_model

    if is_inspection_model(model):
        from fastmaf.inspection.evaluation import evaluate as inspect

        if "false_alarm" in _given(context):
            raise typer.BadParameter("the rate of an inspection model is in its file: fastmaf calibrate sets it")
        inspect(
            model,
            data,
            out,
            device=device_named(device),
            skip_bad=skip_bad,
            seed=seed,
            progress=not quiet,
            say=say,
        )
        return
    from fastmaf.capsule.evaluate import format_table
    from fastmaf.capsule.models import load_model
    from fastmaf.capsule.score import evaluate as run

    loaded = load_model(model, device=device_named(device))
    evaluation = run(loaded, data, out, false_alarm=false_alarm, skip_bad=skip_bad, seed=seed, progress=not quiet)
    say(format_table(evaluation))
    say(f"scores, metrics and figures are in {out}")


@app.command()
def reproduce(
    data: Annotated[
        Path | None, typer.Option("--data", help="The capsule images; without it the synthetic set is drawn.")
    ] = None,
    out: OutOption = Path("results"),
    epochs: Annotated[int | None, typer.Option(help="Default: 100 as the reference; 20 on the synthetic set.")] = None,
    size: SizeOption = 64,
    batch_size: BatchOption = 8,
    lr: RateOption = None,
    blocks: BlocksOption = 7,
    hidden: HiddenOption = "512,512",
    order: OrderOption = Order.natural,
    degrees: Annotated[Degrees, typer.Option(help="Degrees of the hidden units.")] = Degrees.random,
    masks: MasksOption = Masks.strict,
    holdout: Annotated[
        float | None,
        typer.Option(
            help="Share of the normals held out. Default: 0 with --data, as in the reference; 0.1 on the synthetic set."
        ),
    ] = None,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    skip_bad: SkipOption = False,
    device: DeviceOption = "auto",
    cuda_graphs: GraphsOption = True,
    quiet: QuietOption = False,
) -> None:
    """Repeat the published capsule run (train, sample, evaluate) and set both side by side."""
    from fastmaf.capsule.config import TrainConfig
    from fastmaf.capsule.reproduce import reproduce as run

    config = TrainConfig(
        size=size,
        epochs=(20 if data is None else 100) if epochs is None else epochs,
        batch_size=batch_size,
        blocks=blocks,
        hidden_features=_hidden(hidden),
        order=order.value,
        degrees=degrees.value,
        masks=masks.value,
        holdout=(0.1 if data is None else 0.0) if holdout is None else holdout,
        seed=seed,
        **_guards_and_rate(order, None, lr),
    )
    _say_masks(masks)
    result = run(
        out,
        config,
        data=data,
        resume=resume,
        skip_bad=skip_bad,
        device=device_named(device),
        graphs=cuda_graphs,
        progress=not quiet,
        say=say,
    )
    if result is None:
        raise typer.Exit(130)
    say(f"\n{result.table}\n\neverything is in {out}")


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, under two minutes. Without it: under thirty.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for CSV, JSON and figures.")] = Path("bench-results"),
    library: Annotated[
        list[str] | None,
        typer.Option("--library", help="Compare only with this library, such as nflows; may be repeated."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.csv B.csv", help="Measure nothing: show how B differs from A, as ratios."),
    ] = None,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """Time fastmaf beside the naive model, dense weights, nflows, zuko, normflows and flowjax, each checked first."""
    try:
        from fastmaf.bench import command
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the benchmarks need more than is installed ({error}): pip install 'fastmaf[bench]'"
        ) from error

    if compare:
        text, worse = command.compare(*compare)
        say(text)
        raise typer.Exit(1 if worse else 0)
    correct = command.bench(
        out, quick=quick, device=device_named(device), libraries=library or (), progress=not quiet, say=say
    )
    if not correct:
        raise typer.Exit(1)


register(app)


@app.command()
def doctor() -> None:
    """Say what is installed, which devices there are, and which backends are in use and why."""
    from fastmaf.doctor import report

    say(report())


def _guards_and_rate(order: Order, guards: bool | None, lr: float | None) -> dict[str, Any]:
    """Returns the guards, by default for every order but the natural one, and the learning rate if one was given."""
    from fastmaf.capsule.config import GUARDED

    guarded = order is not Order.natural if guards is None else guards
    return {**(GUARDED if guarded else {}), **({} if lr is None else {"lr": lr})}


def _hidden(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"expected units of each hidden layer with commas, such as 512,512; found {text!r}"
        ) from None


def _say_masks(masks: Masks) -> None:
    if masks is Masks.reference:
        say(
            "--masks reference: the notebook's output mask compares degrees with >= instead of >, so some outputs see "
            "their own input. There the log-determinant is wrong: what is called NLL below is no density, and the "
            "model cannot be sampled."
        )


def _plain_warning(
    message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    say_aside(f"note: {message}")


def _let_go_of(stream: TextIO) -> None:
    """Points a stream whose end takes nothing more to nowhere, so that the interpreter does not try again."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def main() -> None:
    """Runs the command; errors that a user can mend are printed without a traceback."""
    import fastmaf
    from fastmaf.capsule.data import DataError
    from fastmaf.capsule.evaluate import EvaluationError
    from fastmaf.capsule.train import TrainingStoppedError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.showwarning = _plain_warning
    for stream in (sys.stdout, sys.stderr):  # a Windows console or pipe may lack the arrows of a table
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    known = (
        DataError,
        EvaluationError,
        TrainingStoppedError,
        fastmaf.CheckpointError,
        fastmaf.NotInvertibleError,
        OSError,
        ValueError,
    )
    try:
        try:
            app()
        finally:
            with write_errors(STDOUT):  # which may hold back what then finds no room
                sys.stdout.flush()
    except known as error:
        _let_go_of(sys.stdout)
        say_aside(f"error: {error_text(error)}")
        sys.exit(1)
    except KeyboardInterrupt:
        say_aside("stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
