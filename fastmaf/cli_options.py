"""Options that several commands of ``fastmaf`` share, and the device that one of them names."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastmaf.io.atomic import STDOUT, write_errors


class Degrees(str, Enum):
    """Degrees of the hidden units."""

    spread = "spread"
    random = "random"
    cyclic = "cyclic"


class Order(str, Enum):
    """Order in which the blocks take the dimensions."""

    natural = "natural"
    alternate = "alternate"
    random = "random"


class RecipeName(str, Enum):
    """What ``fastmaf train`` trains."""

    reference = "reference"
    inspection = "inspection"


class Masks(str, Enum):
    """Output masks."""

    strict = "strict"
    reference = "reference"


DataOption = Annotated[
    Path,
    typer.Option(
        "--data",
        help="Folder with train/good, test/<class> and, optionally, ground_truth/<class>; to train, a folder of good "
        "images will do.",
    ),
]
ModelOption = Annotated[Path, typer.Option("--model", help="Model file, or the folder of a training run.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
SizeOption = Annotated[int, typer.Option(help="Side of the square images in pixels.")]
EpochsOption = Annotated[int, typer.Option(help="Passes over the training images.")]
BatchOption = Annotated[int, typer.Option(help="Images a step.")]
RateOption = Annotated[float | None, typer.Option("--lr", help="Adam's rate. Default: 1e-4, or 2e-5 with guards.")]
BlocksOption = Annotated[int, typer.Option(help="Blocks of the flow.")]
HiddenOption = Annotated[str, typer.Option("--hidden", help="Units of each hidden layer, with commas.")]
OrderOption = Annotated[Order, typer.Option(help="natural in every block, reversed in every second one, or random.")]
MasksOption = Annotated[
    Masks, typer.Option(help="strict, or the published notebook's leaky output mask, which scores but cannot sample.")
]
LevelsOption = Annotated[
    int | None, typer.Option(help="At most this many distinct hidden degrees: fewer dependent steps when sampling.")
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Makes the run repeatable.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the output folder.")]
SkipOption = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out files that cannot be read, naming them, instead of stopping.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, or cuda.")]
GraphsOption = Annotated[
    bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help="On a GPU, replay training steps as CUDA graphs.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
AlarmOption = Annotated[
    float, typer.Option(help="Share of normal images that the held-out threshold may call defective.")
]


def say(text: str) -> None:
    """Prints text in which names of files and classes may stand: a terminal obeys nothing in it but line breaks."""
    with write_errors(STDOUT):
        typer.echo(_printable(text))


def say_aside(text: str) -> None:
    """``say`` to standard error."""
    typer.echo(_printable(text), err=True)


def _printable(text: str) -> str:
    from fastmaf.images.names import visible

    return visible(text, keep="\n")


def error_text(error: BaseException) -> str:
    """What went wrong, for a person; of an error of the system the file and the reason."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    reason = error.strerror[:1].lower() + error.strerror[1:]
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def device_named(name: str) -> str:
    """Returns torch's name of a device that is there; ``auto`` is CUDA where it can be used."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no usable CUDA device here; 'fastmaf doctor' says why")
    if kind not in ("cpu", "cuda") or (index or "0") not in map(str, range(max(1, torch.cuda.device_count()))):
        raise typer.BadParameter(
            f"expected the device auto, cpu, cuda, or one that is there, as cuda:0; found {name!r}"
        )
    return name
