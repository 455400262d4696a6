"""Output to the terminal, and how much of it: text, JSON, and errors."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import typer

from fastmaf.images.names import visible
from fastmaf.io.atomic import STDOUT, write_errors

LOG = logging.getLogger("fastmaf")


def say(text: str) -> None:
    """Prints text that may hold names of files and classes; control characters other than line breaks are escaped."""
    with write_errors(STDOUT):
        typer.echo(visible(text, keep="\n"))


def say_aside(text: str) -> None:
    """``say`` to standard error; a stream that is missing, closed or broken is no error."""
    with suppress(OSError, ValueError):
        typer.echo(visible(text, keep="\n"), err=True)


def error_text(error: BaseException) -> str:
    """Returns the message of an error; of a system error the file and the reason."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    reason = error.strerror[:1].lower() + error.strerror[1:]
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def say_or_aside(as_json: bool) -> Callable[[str], None]:
    """Returns where texts go: to standard error if standard output is for JSON."""
    return say_aside if as_json else say


def say_json(content: Any) -> None:
    """Prints one JSON document to standard output, escaped to ASCII, which keeps file names of any encoding.

    Raises:
        ValueError: a number is not finite, which JSON cannot express.
    """
    with write_errors(STDOUT):
        typer.echo(json.dumps(content, indent=2, allow_nan=False))


def set_verbose(verbose: bool) -> bool:
    """Sets whether work is logged, and whether errors show where they were raised."""
    LOG.setLevel(logging.INFO if verbose else logging.WARNING)
    return verbose


def is_verbose() -> bool:
    """Returns whether ``set_verbose(True)`` was called."""
    return LOG.isEnabledFor(logging.INFO)
