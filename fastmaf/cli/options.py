"""Options that several commands share, and checks of their values that do not need torch."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_origin

import typer

from fastmaf.cli.output import set_verbose
from fastmaf.images.names import visible

LARGEST = 2**31 - 1
"""The largest number that checkpoints store."""


def refuse(message: str) -> NoReturn:
    """Ends the command with a usage error: exit code 2."""
    raise typer.BadParameter(visible(message, keep="\n"))


@contextmanager
def checked_settings() -> Iterator[None]:
    """Turns a ValueError of a settings class into a usage error."""
    try:
        yield
    except ValueError as error:
        refuse(str(error))


def device_named(name: str) -> str:
    """Returns the torch device of a checked ``--device``; ``auto`` is CUDA where it is available."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        refuse("no usable CUDA device was found; 'fastmaf doctor' shows why")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        refuse(f"there is no device {name}: {torch.cuda.device_count()} CUDA devices are available")
    return name


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu(:0)?|cuda(:\d+)?", name, re.ASCII):
        refuse(f"expected auto, cpu, cuda or a CUDA device such as cuda:0; found {name!r}")
    return name


def size_or_auto(text: str) -> str:
    """Refuses a size that is neither ``auto`` nor a whole number from 1 to 16,384."""
    if text != "auto" and not (re.fullmatch(r"\d{1,5}", text, re.ASCII) and 1 <= int(text) <= 2**14):
        refuse(f"expected auto or a whole number from 1 to {2**14}; found {text!r}")
    return text


def inspected_kind(text: str) -> str:
    """Refuses a kind of images that is not ``auto``, ``object`` or ``texture``."""
    if text not in ("auto", "object", "texture"):
        refuse(f"expected auto, object or texture; found {text!r}")
    return text


def share(value: float | None) -> float | None:
    """Refuses a rate or probability that is not between 0 and 1."""
    if value is not None and not 0 < value < 1:
        refuse(f"expected a number between 0 and 1; found {value:g}")
    return value


def _follow_links(context: typer.Context, follow: bool) -> bool:
    from fastmaf.images.listing import following_links

    context.with_resource(following_links(follow))  # until the command ends
    return follow


def _deterministic(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        from fastmaf import deterministic
        from fastmaf.metrics.blas_threads import one_blas_thread

        context.with_resource(deterministic())  # until the command ends
        context.with_resource(one_blas_thread())
    return wanted


def existing(path: Path | None) -> Path | None:
    """Refuses a path that does not exist."""
    if path is not None and not path.expanduser().exists():
        refuse(f"no such file or folder: {path}")
    return path


def existing_images(arguments: list[str] | None) -> list[str] | None:
    """Refuses an argument that names no file or folder, and a pattern that matches none."""
    from fastmaf.inspection.workflow.path_patterns import hints, is_pattern, matches

    for text in arguments or ():
        path = Path(os.path.expanduser(text))
        if text == "-" or os.path.lexists(path) or is_pattern(text) and any(matches(path)):
            continue
        refuse(f"{'nothing matches' if is_pattern(text) else 'no such file or folder:'} {text}{hints(path)}")
    return arguments


def options_of(other: Callable[..., None], without: Sequence[str] = (), **defaults: Any) -> Callable[[Any], Any]:
    """Gives a command the options of another one but for some, and some with other defaults.

    The command's parameters are those that it reads, and those whose annotation replaces the option of this name.
    """
    parameters = dict(inspect.signature(other, eval_str=True).parameters)
    for name in without:
        del parameters[name]
    parameters |= {name: parameters[name].replace(default=default) for name, default in defaults.items()}

    def decorate(command: Any) -> Any:
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            if name in parameters and get_origin(parameter.annotation) is Annotated:
                parameters[name] = parameter
        command.__signature__ = inspect.Signature(list(parameters.values()))
        return command

    return decorate


TrainData = Annotated[
    Path,
    typer.Option(
        "--data", metavar="DIR", callback=existing, help="Folder of good images, or a data set with train/good."
    ),
]
TestData = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="DIR",
        callback=existing,
        help="Data set: test/good, test/<class of defects>; optionally train/good and ground_truth/<class>.",
    ),
]
OptionalData = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", callback=existing, help="The capsule images; by default a synthetic set is drawn."
    ),
]
Model = Annotated[Path, typer.Argument(metavar="MODEL", callback=existing, help="Model file, or the folder of a run.")]
IMAGES = "files, folders, patterns such as 'in/*.png', or - for a list on standard input."
Images = Annotated[list[str], typer.Argument(metavar="IMAGES", callback=existing_images, help=f"Images: {IMAGES}")]
CheckImages = Annotated[
    list[str],
    typer.Option("--check", metavar="IMAGES", callback=existing_images, help=f"Good images to compare on: {IMAGES}"),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder.")]
Size = Annotated[int, typer.Option(min=1, max=2**14, metavar="N", help="Side of the square images in pixels.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Seed of the random numbers.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip and list unreadable files instead of stopping.")]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        callback=_deterministic,
        help="Give the same bits again on this machine, at any number of threads: compute on one.",
    ),
]
FollowLinks = Annotated[
    bool,
    typer.Option("--follow-links", callback=_follow_links, help="Follow links that lead out of the folder of images."),
]
Device = Annotated[
    str, typer.Option(callback=_device, metavar="NAME", help="auto, cpu, cuda, or a CUDA device such as cuda:0.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", callback=set_verbose, help="Log what is done; show where an error was raised."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object; everything else goes to standard error.")]
Explain = Annotated[bool, typer.Option("--explain", help="Explain the figures and what they assume.")]
FalseAlarm = Annotated[
    float, typer.Option(callback=share, metavar="RATE", help="Accepted share of good images above the threshold.")
]
Confidence = Annotated[
    float | None,
    typer.Option(
        callback=share,
        metavar="P",
        help="Guarantee the rate for this calibration set with this probability, such as 0.95; by default on average "
        "over calibration sets.",
    ),
]
