"""Parsing of untrusted JSON: bounded nesting, unique keys, finite numbers."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 32

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 5
_short.maxlevel = 2


class JSONError(ValueError):
    """The text is not valid JSON of the expected form; the message names the place and the reason."""


def shown(value: object) -> str:
    """Returns a short, escaped representation of a value for messages."""
    return _short.repr(value)


def child(where: str, key: str | int) -> str:
    """Returns the path of an entry of a list or an object, such as ``transforms[0].features``."""
    if isinstance(key, int):
        return f"{where}[{key}]"
    return f"{where}.{key}" if key.isidentifier() and len(key) <= 60 else f"{where}[{shown(key)}]"


def parse(text: str, where: str, *, finite: bool = True) -> Any:
    """Parses untrusted JSON.

    Args:
        text: the JSON.
        where: the name of the text, with which the paths of values in messages begin.
        finite: refuse NaN and infinities.

    Raises:
        JSONError: the text is not JSON, is nested more than ``MAX_DEPTH`` deep, repeats a key of an object, or, with
            ``finite``, contains a number that is not finite.
    """
    not_finite: list[str] = []
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_float=lambda digits: _number(digits, not_finite),
            parse_constant=lambda name: _number(name, not_finite),
        )
    except RecursionError:
        raise JSONError(f"{where}: nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise JSONError(f"{where}: not valid JSON: {error}") from None
    level, depth = [value], 0
    while level:  # level by level, without recursion
        if depth > MAX_DEPTH:
            raise JSONError(f"{where}: nested more than {MAX_DEPTH} deep")
        level, depth = [inner for outer in level for inner in _entries(outer) if type(inner) in (dict, list)], depth + 1
    if not_finite and finite:
        raise JSONError(f"{_first_not_finite(value, where)}: expected a finite number; found {not_finite[0][:60]}")
    return value


def _entries(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _first_not_finite(value: Any, where: str) -> str | None:
    """Returns the path of the first number that is not finite, or None."""
    if isinstance(value, float) and not math.isfinite(value):
        return where
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in pairs:
        if isinstance(entry, (dict, list, float)) and (path := _first_not_finite(entry, "")) is not None:
            return child(where, key) + path
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise JSONError(f"the key {shown(counts.most_common(1)[0][0])} appears twice in one object")
    return entries


def _number(text: str, not_finite: list[str]) -> float:
    value = float(text)
    if not math.isfinite(value):
        not_finite.append(text)
    return value
