"""JSON from strangers: bounded nesting, no key twice, no number that is not finite."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 32
_MAX_DIGITS = 300  # of a whole number: all of them convert to float

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
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_whole)
    except RecursionError:
        raise JSONError(f"{where}: nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise JSONError(f"{where}: not valid JSON: {error}") from None
    # Level by level instead of by recursion.
    level, depth = [(where, value)], 0
    while level:
        if depth > MAX_DEPTH:
            raise JSONError(f"{where}: nested more than {MAX_DEPTH} deep")
        level, depth = [entry for path, found in level for entry in _entries(path, found, finite)], depth + 1
    return value


def _entries(where: str, value: Any, finite: bool) -> Iterator[tuple[str, Any]]:
    """Yields the lists, objects and infinite numbers among the entries of a list or an object."""
    if isinstance(value, float) and finite and not math.isfinite(value):
        raise JSONError(f"{where}: expected a finite number; found {value}")
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, found in pairs:
        if isinstance(found, (dict, list)) or (isinstance(found, float) and not math.isfinite(found)):
            yield child(where, key), found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JSONError(f"the key {shown(twice)} appears twice in one object")
    return found


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise JSONError(f"a whole number has {len(text)} digits; at most {_MAX_DIGITS} are read")
    return int(text)
