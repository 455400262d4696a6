"""JSON from strangers: bounded nesting, no key twice, no number that is not finite."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 32

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 5
_short.maxlevel = 2


class JSONError(ValueError):
    """A text is not the JSON that was expected; the message says where and why."""


def shown(value: object) -> str:
    """Returns a value as a message may show it: short and escaped, whatever it holds."""
    return _short.repr(value)


def child(where: str, key: str | int) -> str:
    """Returns the path of an entry of a list or an object: ``transforms[0].features``."""
    if isinstance(key, int):
        return f"{where}[{key}]"
    return f"{where}.{key}" if key.isidentifier() and len(key) <= 60 else f"{where}[{shown(key)}]"


def parse(text: str, where: str, *, finite: bool = True) -> Any:
    """Parses JSON that may come from anywhere.

    Args:
        text: the JSON.
        where: what it is, for messages: paths of values begin with it.
        finite: refuse NaN and infinities.

    Raises:
        JSONError: the text is not JSON, is nested more than ``MAX_DEPTH`` deep, names a key twice, or holds a number
            that is not finite.
    """
    odd: list[str] = []
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_float=lambda digits: _number(digits, odd),
            parse_constant=lambda name: _number(name, odd),
        )
    except RecursionError:
        raise JSONError(f"{where}: nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise JSONError(f"{where}: not valid JSON: {error}") from None
    level, depth = [value], 0
    while level:  # level by level instead of by recursion
        if depth > MAX_DEPTH:
            raise JSONError(f"{where}: nested more than {MAX_DEPTH} deep")
        level, depth = [inner for outer in level for inner in _entries(outer) if type(inner) in (dict, list)], depth + 1
    if odd and finite:
        raise JSONError(f"{_first_odd(value, where)}: expected a finite number; found {odd[0][:60]}")
    return value


def _entries(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _first_odd(value: Any, where: str) -> str | None:
    """Returns the path of the first number that is not finite, of which there is one."""
    if isinstance(value, float) and not math.isfinite(value):
        return where
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, found in pairs:
        if isinstance(found, (dict, list, float)) and (path := _first_odd(found, "")) is not None:
            return child(where, key) + path
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JSONError(f"the key {shown(twice)} appears twice in one object")
    return found


def _number(text: str, odd: list[str]) -> float:
    value = float(text)
    if not math.isfinite(value):
        odd.append(text)
    return value
