"""Former spellings of the commands: each runs its successor, and names it on standard error.

They work for one release: the commands without their group (``fastmaf score``), the group ``inspection`` with its
``train``, and ``--model`` where the model is an argument now.
"""

from __future__ import annotations

import shlex
from typing import Any, Literal, TypeAlias

import typer
from typer.core import TyperCommand

from fastmaf.cli.output import say_aside

Words: TypeAlias = tuple[str, ...]
"""The words of a command after ``fastmaf``."""

_CAPSULE = ("demo-data", "sample", "reproduce")
_INSPECT = ("calibrate", "recalibrate", "score", "choose", "export")
_FORWARDED: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


class ModelArgument(TyperCommand):
    """A command whose first argument is the model, which was the option ``--model`` before."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        before, model = _option("--model", args)
        if model is None:
            return super().parse_args(ctx, args)
        say_aside(f"note: --model is now an argument: {ctx.command_path} {shlex.quote(model)}")
        return super().parse_args(ctx, [model, *before])


def _option(name: str, arguments: list[str]) -> tuple[list[str], str | None]:
    """Returns the arguments without an option, and the option's last value or None."""
    rest, value, words = [], None, iter(arguments)
    for word in words:
        key, equals, text = word.partition("=")
        if key != name:
            rest.append(word)
        elif equals:
            value = text
        else:
            value = next(words, None)
            if value is None:
                return arguments, None
    return rest, value


def add_former_commands(app: typer.Typer) -> None:
    """Adds the former spellings, which help does not list."""
    for name in _CAPSULE:
        _add(app, name, ("capsule", name))
    for name in _INSPECT:
        _add(app, name, ("inspect", name))
    app.command("train", hidden=True, **_FORWARDED)(train)
    app.command("eval", hidden=True, **_FORWARDED)(evaluate)
    group = typer.Typer(no_args_is_help=True)
    for name in _INSPECT:
        _add(group, name, ("inspect", name), "inspection")
    _add(group, "train", ("inspect", "fit"), "inspection")
    _add(group, "eval", ("inspect", "eval"), "inspection")
    app.add_typer(group, name="inspection", hidden=True, help="The former name of the group inspect.")


def _add(app: typer.Typer, name: str, successor: Words, group: str = "") -> None:
    def former(context: typer.Context) -> None:
        _forward(context, f"{group} {name}".lstrip(), successor, context.args)

    app.command(name, hidden=not group, help=f"The former name of {' '.join(successor)}.", **_FORWARDED)(former)


def train(context: typer.Context, recipe: Literal["published", "reference", "inspection"] = "published") -> None:
    """The former name of capsule train and, with --recipe inspection, of inspect fit."""
    successor = ("inspect", "fit") if recipe == "inspection" else ("capsule", "train")
    _forward(context, f"train --recipe {recipe}" if recipe == "inspection" else "train", successor, context.args)


def evaluate(context: typer.Context) -> None:
    """The former name of capsule eval and inspect eval, which were told apart by the model file."""
    group = "capsule"
    if not {"-h", "--help"} & set(context.args):
        group = "inspect" if _is_inspection_model(_option("--model", context.args)[1] or "results") else "capsule"
    _forward(context, "eval", (group, "eval"), context.args)


def _is_inspection_model(path: str) -> bool:
    from fastmaf.inspection.model import is_inspection_model

    try:
        return is_inspection_model(path)
    except OSError:  # reported by the command
        return False


def _forward(context: typer.Context, name: str, successor: Words, arguments: list[str]) -> None:
    root: Any = context.find_root()
    command = root.command
    for word in successor:
        command = command.commands[word]
    new = " ".join(successor)
    say_aside(f"note: 'fastmaf {name}' is now 'fastmaf {new}'; the former name works until the next release")
    with command.make_context(new, list(arguments), parent=root) as forwarded:
        command.invoke(forwarded)
