"""The ``fastmaf`` command: its groups of commands, and how it reports errors and warnings."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import Annotated, Any, Literal, TextIO

import typer

import fastmaf
from fastmaf.cli import capsule, inspection, tools
from fastmaf.cli.options import error_text, say, say_aside
from fastmaf.io.atomic import STDOUT, write_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(inspection.app, name="inspection", help="Find defects in images of any object, from good images alone.")
app.add_typer(capsule.app, name="capsule", help="The published run on images of capsules.")
# Commands are found without the name of their group, too; train, which both groups have, is replaced below.
app.registered_commands += inspection.app.registered_commands + capsule.app.registered_commands
app.command()(tools.bench)
app.command()(tools.doctor)


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
    """Masked autoregressive flows: train on good images, sample, and find defects by negative log-likelihood.

    All commands but bench and doctor belong to a group, inspection or capsule, whose name can be omitted.
    """


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(context: typer.Context, recipe: Literal["published", "reference", "inspection"] = "published") -> None:
    """Train a flow on good images, as fastmaf capsule train or, with --recipe inspection, fastmaf inspection train."""
    root: Any = context.find_root().command
    group = "inspection" if recipe == "inspection" else "capsule"
    command = root.commands[group].commands["train"]
    with command.make_context(f"{group} train", context.args, parent=context.parent) as forwarded:
        command.invoke(forwarded)


def _close(stream: TextIO) -> None:
    """Redirects a stream that cannot be written to nowhere, so that the interpreter does not fail on it at exit."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _is_expected(error: Exception) -> bool:
    """Returns whether the message of an error is meant for users of the command."""
    return isinstance(error, (OSError, ValueError)) or type(error).__module__.startswith("fastmaf.")


def main() -> None:
    """Runs the command; errors that users can correct are printed without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.showwarning = lambda message, *_, **__: say_aside(f"note: {message}")
    for stream in (sys.stdout, sys.stderr):  # a Windows console or pipe may lack the arrows of a table
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            app()
        finally:
            with write_errors(STDOUT):  # a full disk may show only when the buffer is flushed
                sys.stdout.flush()
    except Exception as error:
        if not _is_expected(error):
            raise
        _close(sys.stdout)
        say_aside(f"error: {error_text(error)}")
        sys.exit(1)
    except KeyboardInterrupt:
        say_aside("stopped")
        sys.exit(130)
