"""Schemas of JSON documents, and the validation of documents against them.

Example:
    >>> from fastmaf.io.schema import Maybe, Number, Record, Text
    >>> point = Record({"x": Number(), "label": Maybe(Text())})
    >>> point.check({"x": 1.5, "label": 3}, "point")
    Traceback (most recent call last):
    fastmaf.io.schema.SchemaError: point.label: expected text of at most 10000 characters or null; found 3
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastmaf.io.safe_json import child, shown


class SchemaError(ValueError):
    """A value violates the schema; the message names its path, what was expected and what was found."""


class Field:
    """The schema of a value that has no entries, or whose entries may be anything.

    Args:
        expected: completes a message that begins with "expected".
        accepts: returns whether the type and range of a value are allowed.
    """

    def __init__(self, expected: str, accepts: Callable[[Any], bool]) -> None:
        self.expected, self.accepts = expected, accepts

    def check(self, value: Any, where: str) -> None:
        """Raises SchemaError if the value or one of its entries is not allowed; ``where`` is the path of the value."""
        if not self.accepts(value):
            raise SchemaError(f"{where}: expected {self.expected}; found {shown(value)}")


class Whole(Field):
    """An integer from ``low`` to ``high``; floats and booleans are not allowed."""

    def __init__(self, low: int = 0, high: int = 2**31 - 1) -> None:
        super().__init__(
            f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high
        )


class Number(Field):
    """A number from ``low`` to ``high``, greater than ``above`` and less than ``below``, finite by default."""

    def __init__(
        self,
        low: float = -math.inf,
        high: float = math.inf,
        above: float = -math.inf,
        below: float = math.inf,
        finite: bool = True,
    ) -> None:
        def accepts(value: Any) -> bool:
            if type(value) not in (int, float):
                return False
            if not -sys.float_info.max <= value <= sys.float_info.max:  # NaN and infinities, and integers too large
                return not finite and isinstance(value, float)
            return bool(low <= value <= high and above < value < below)

        limits = ("at least", low), ("at most", high), ("greater than", above), ("less than", below)
        bounds = " and ".join(f"{words} {limit:g}" for words, limit in limits if math.isfinite(limit))
        super().__init__(f"{'a finite number' if finite else 'a number'} {bounds}".strip(), accepts)


class Text(Field):
    """A string of at most ``longest`` characters."""

    def __init__(self, longest: int = 10_000) -> None:
        super().__init__(
            f"text of at most {longest} characters", lambda value: isinstance(value, str) and len(value) <= longest
        )


class OneOf(Field):
    """One of the strings ``known``."""

    def __init__(self, known: Iterable[str]) -> None:
        names = tuple(known)
        super().__init__(
            f"one of {', '.join(map(repr, names))}", lambda value: isinstance(value, str) and value in names
        )


class Flag(Field):
    """True or false."""

    def __init__(self) -> None:
        super().__init__("true or false", lambda value: isinstance(value, bool))


class Anything(Field):
    """Any value that ``safe_json.parse`` returns."""

    def __init__(self) -> None:
        super().__init__("any value", lambda value: True)


class Maybe(Field):
    """Null, or a value that ``field`` allows."""

    def __init__(self, field: Field) -> None:
        super().__init__(f"{field.expected} or null", lambda value: value is None or field.accepts(value))
        self._field = field

    def check(self, value: Any, where: str) -> None:
        super().check(value, where)
        if value is not None:
            self._field.check(value, where)


class ListOf(Field):
    """A list of ``shortest`` to ``longest`` entries that ``item`` allows."""

    def __init__(self, item: Field, shortest: int = 0, longest: int = 2**31 - 1) -> None:
        count = shortest if shortest == longest else f"{shortest} to {longest}"
        super().__init__(
            f"a list of {count} entries", lambda value: isinstance(value, list) and shortest <= len(value) <= longest
        )
        self._item = item

    def check(self, value: Any, where: str) -> None:
        super().check(value, where)
        for i, entry in enumerate(value):
            self._item.check(entry, child(where, i))


class MapOf(Field):
    """An object of at most 65,536 entries that ``item`` allows, with any keys."""

    def __init__(self, item: Field) -> None:
        super().__init__(
            "an object of at most 65536 entries", lambda value: isinstance(value, dict) and len(value) <= 65_536
        )
        self._item = item

    def check(self, value: Any, where: str) -> None:
        super().check(value, where)
        for key, entry in value.items():
            self._item.check(entry, child(where, key))


class Record(Field):
    """An object with the entries ``required``, any of ``optional``, and others that ``others`` allows."""

    def __init__(
        self,
        required: Mapping[str, Field] | None = None,
        optional: Mapping[str, Field] | None = None,
        others: Field | None = None,
    ) -> None:
        super().__init__("an object", lambda value: isinstance(value, dict))
        self.required, self.known, self.others = required or {}, {**(required or {}), **(optional or {})}, others

    def check(self, value: Any, where: str) -> None:
        super().check(value, where)
        if missing := [name for name in self.required if name not in value]:
            raise SchemaError(f"{where}: the entry {missing[0]!r} is missing; found {shown(sorted(value))}")
        for key, entry in value.items():
            field = self.known.get(key, self.others)
            if field is None:
                known = ", ".join(map(repr, self.known))
                raise SchemaError(f"{where}: unknown entry {shown(key)}; known are {known}")
            field.check(entry, child(where, key))
