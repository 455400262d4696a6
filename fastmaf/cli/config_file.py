"""Settings of a command from a TOML or JSON file: ``fastmaf inspect fit --config run.toml``.

The keys are the names of the command's options and of the fields of its settings class. Options on the command line
take precedence over the file, the file over the defaults.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

import typer

from fastmaf.cli.options import refuse
from fastmaf.extras import MissingExtraError
from fastmaf.io.safe_json import JSONError, parse, shown

Plain: TypeAlias = bool | int | float | str
"""A value of a configuration file."""

_FIELDS = "fastmaf.config_fields"
_NOT_IN_FILES = ("config", "print_config", "resume", "explain", "as_json", "quiet", "verbose")


def reads(about: Callable[[], tuple[Callable[..., None], type]]) -> Callable[[typer.Context, Path | None], Path | None]:
    """Returns the callback of a command's ``--config``, which must be eager.

    Values of options become their defaults; the others are kept for ``from_file``.

    Args:
        about: returns the command and its settings class, a dataclass; called only if there is a file.
    """

    def read(context: typer.Context, path: Path | None) -> Path | None:
        if path is None:
            return None
        command, settings = about()
        options = {name: hint for name, hint in get_type_hints(command).items() if _members(hint) is not None}
        options = {name: hint for name, hint in options.items() if name not in (*_NOT_IN_FILES, "return")}
        known = {**{f.name: hint for f, hint in _plain_fields(settings)}, **options}
        content = {key.replace("-", "_"): value for key, value in read_file(path).items()}
        _refuse_unknown(path, content, sorted(known))
        for key, value in content.items():
            _refuse_kind(path, key, value, known[key])
        given = {key: value for key, value in content.items() if key in options}
        texts = {key for key, value in given.items() if value is not None and str in (_members(options[key]) or ())}
        given = {key: str(value) if key in texts else value for key, value in given.items()}
        context.default_map = {**(context.default_map or {}), **given}
        context.meta[_FIELDS] = {key: value for key, value in content.items() if key not in options}
        return path

    return read


def from_file(context: typer.Context) -> dict[str, Any]:
    """Returns the fields of the settings class that a configuration file gave, without the command's options."""
    return dict(context.meta.get(_FIELDS, {}))


def read_file(path: Path) -> dict[str, Any]:
    """Returns the content of a ``.toml`` or ``.json`` file; a usage error if it is neither, or not readable."""
    if path.suffix not in (".toml", ".json"):
        refuse(f"expected a .toml or .json file for --config; found {path}")
    try:
        text = path.expanduser().read_text("utf-8")
        content = parse(text, str(path)) if path.suffix == ".json" else _toml(path, text)
    except JSONError as error:
        refuse(str(error))
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")
    if not isinstance(content, dict):
        refuse(f"{path}: expected keys and values; found {shown(content)}")
    return content


def resolved(settings: Any, **options: Plain | None) -> dict[str, Plain | None]:
    """Returns options and the fields of the settings of a command as the content of a configuration file."""
    values = asdict(settings)
    return {**{f.name: values[f.name] for f, _ in _plain_fields(type(settings))}, **options}


def to_toml(content: Mapping[str, Plain | None]) -> str:
    """Returns keys and values as TOML, which has no null: keys without a value are omitted.

    Example:
        >>> print(to_toml({"data": "parts", "size": 64, "logit": None, "keep_folds": False, "lr": 0.02}))
        data = "parts"
        size = 64
        keep_folds = false
        lr = 0.02
    """
    # JSON's notation of texts, numbers and booleans is TOML's, too; DEL is the one character to be escaped besides.
    pairs = {key: json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F") for key, value in content.items()}
    return "\n".join(f"{key} = {text}" for key, text in pairs.items() if content[key] is not None)


def _toml(path: Path, text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise MissingExtraError(
                'TOML files need tomli before Python 3.11: pip install "fastmaf[cli]", or write the file as .json'
            ) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        refuse(f"{path}: not valid TOML: {error}")


def _plain_fields(settings: type) -> list[tuple[Any, Any]]:
    """Returns the fields of a dataclass whose values are plain, with their types."""
    hints = get_type_hints(settings)
    return [(f, hints[f.name]) for f in fields(settings) if _members(hints[f.name]) is not None]


def _members(hint: Any) -> tuple[Any, ...] | None:
    """Returns the types and literal values that a hint is made of, or None if it has others."""
    if hint in (bool, int, float, str, NoneType):
        return (hint,)
    if hint is Path:
        return (str,)
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        parts = [_members(part) for part in get_args(hint)]
        return None if None in parts else tuple(member for part in parts for member in part or ())
    return None


def _refuse_kind(path: Path, key: str, value: Any, hint: Any) -> None:
    """Refuses a value of another type; whole numbers are accepted for floats, and numbers for texts."""
    members = _members(hint) or ()
    kinds = {member for member in members if isinstance(member, type)}
    literals = [member for member in members if not isinstance(member, type)]
    if (
        type(value) in kinds
        or (float in kinds and type(value) is int)
        or (str in kinds and type(value) in (int, float))
    ):
        return
    if any(type(value) is type(literal) and value == literal for literal in literals):
        return
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    expected = [*map(json.dumps, literals), *(text for kind, text in names.items() if kind in kinds)]
    refuse(f"{path}: {key}: expected {' or '.join(expected)}; found {shown(value)}")


def _refuse_unknown(path: Path, content: Mapping[str, Any], known: list[str]) -> None:
    for key in content:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
            refuse(f"{path}: unknown key {shown(key)}: {hint}")
