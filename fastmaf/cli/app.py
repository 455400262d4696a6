"""The ``fastmaf`` command: its groups of commands, and how it reports errors and warnings."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import warnings
from typing import Annotated, TextIO

import typer

import fastmaf
from fastmaf.cli import capsule, inspection, tools
from fastmaf.cli.former import add_former_commands
from fastmaf.cli.output import LOG, error_text, is_verbose, say, say_aside, set_verbose
from fastmaf.io.atomic import STDOUT, write_errors

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 success, 1 error, 2 wrong usage, 130 interrupted; inspect score and bench state their own.",
)
app.add_typer(inspection.app, name="inspect")
app.add_typer(capsule.app, name="capsule")
app.command()(tools.bench)
app.command()(tools.doctor)
add_former_commands(app)


def _version(asked: bool) -> None:
    if asked:
        say(f"fastmaf {fastmaf.__version__}")
        raise typer.Exit


@app.callback()
def fastmaf_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Masked autoregressive flows at image size: densities, samples, and inspection of images for defects."""


def _close(stream: TextIO | None) -> None:
    """Redirects a stream that cannot be written to nowhere, so that the interpreter does not fail on it at exit."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _is_expected(error: Exception) -> bool:
    """Returns whether the message of an error is meant for users of the command."""
    return isinstance(error, (OSError, ValueError)) or type(error).__module__.startswith("fastmaf.")


def _is_out_of_memory(error: Exception) -> bool:
    """Returns whether an allocation failed; torch raises a RuntimeError on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _is_of_ctrl_c(error: BaseException | None) -> bool:
    """Returns whether a KeyboardInterrupt led to an error; recent versions of typer turn it into an exit code."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def main() -> None:
    """Runs the command; errors that users can correct are printed without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    set_verbose(False)
    start = time.perf_counter()
    warnings.showwarning = lambda message, *_, **__: say_aside(f"note: {message}")
    for stream in (sys.stdout, sys.stderr):  # a Windows console or pipe may lack the arrows of a table
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            app(prog_name="fastmaf")
        finally:
            LOG.info("finished after %.1f s", time.perf_counter() - start)
            with write_errors(STDOUT):  # a full disk may show only when the buffer is flushed
                if sys.stdout is not None:  # it is None if it was closed before the start
                    sys.stdout.flush()
    except Exception as error:
        out_of_memory = _is_out_of_memory(error)
        if not (_is_expected(error) or out_of_memory) or is_verbose():
            raise
        _close(sys.stdout)
        text = "not enough memory: choose a smaller model or smaller images" if out_of_memory else error_text(error)
        say_aside(f"error: {text}")
        _close(sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        say_aside("stopped")
        sys.exit(130)
    except SystemExit as ended:
        if _is_of_ctrl_c(ended):
            say_aside("stopped")
        raise
