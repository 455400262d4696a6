"""JSON with finite numbers alone; parsing of untrusted JSON: bounded nesting, unique keys."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from typing import Any

MAX_DEPTH = 32
MAX_VALUES = 4_000_000  # each takes up to some hundred bytes, however few characters it has

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 5
_short.maxlevel = 2


class JSONError(ValueError):
    """The text is not valid JSON of the expected form; the message names the place and the reason."""


def shown(value: object) -> str:
    """Returns a short, escaped representation of a value for messages."""
    return _short.repr(value)


def finite(value: float | None) -> float | None:
    """Returns a number, or None in place of one that is not finite, for which JSON has no notation."""
    return value if value is not None and math.isfinite(value) else None


def child(where: str, key: str | int) -> str:
    """Returns the path of an entry of a list or an object, such as ``transforms[0].features``."""
    if isinstance(key, int):
        return f"{where}[{key}]"
    return f"{where}.{key}" if key.isidentifier() and len(key) <= 60 else f"{where}[{shown(key)}]"


def parse(text: str, where: str, *, finite: bool = True) -> Any:
    """Parses untrusted JSON; integers of more than 64 bits become floats.

    Args:
        text: the JSON.
        where: the name of the text, with which the paths of values in messages begin.
        finite: refuse NaN and infinities.

    Raises:
        JSONError: the text is not JSON, is nested more than ``MAX_DEPTH`` deep, may hold more than ``MAX_VALUES``
            values, repeats a key of an object, or, with ``finite``, contains a number that is not finite.
    """
    if sum(map(text.count, "[{,")) > MAX_VALUES:
        raise JSONError(f"{where}: more than {MAX_VALUES:,} values")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_number)
    except RecursionError:
        raise JSONError(f"{where}: nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise JSONError(f"{where}: not valid JSON: {error}") from None
    _check(value, where, finite)
    return value


def _number(text: str) -> int | float:
    """Returns an integer of 64 bits, or a larger one as the float that it rounds to: libraries take no others."""
    value = int(text)
    return value if -(2**63) <= value < 2**63 else float(text)


def _check(value: Any, where: str, finite: bool, depth: int = 0) -> None:
    """Checks the depth of a parsed value, and that its numbers are finite."""
    if finite and isinstance(value, float) and not math.isfinite(value):
        raise JSONError(f"{where}: expected a finite number; found {json.dumps(value)}")
    if not isinstance(value, (dict, list)):
        return
    if depth > MAX_DEPTH:
        raise JSONError(f"{where}: nested more than {MAX_DEPTH} deep")
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(entry, (dict, list, float)):
            _check(entry, child(where, key), finite, depth + 1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise JSONError(f"the key {shown(counts.most_common(1)[0][0])} appears twice in one object")
    return entries
