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
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from fastmaf.io.safe_json import child, shown


class SchemaError(ValueError):
    """A value violates the schema; the message names its path, what was expected and what was found."""


class _MismatchError(Exception):
    """A violation, and the keys that lead to it, the innermost first."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.keys: list[str | int] = []


class Field(ABC):
    """The schema of a value; ``str(field)`` completes a message that begins with "expected"."""

    @abstractmethod
    def accepts(self, value: Any) -> bool:
        """Returns whether the type and range of the value are allowed, without checking its entries."""

    def entries(self, value: Any) -> Iterator[tuple[str | int, Field, Any]]:
        """Yields the key, the schema and the value of each entry of an accepted value."""
        yield from ()

    def check(self, value: Any, where: str) -> None:
        """Raises SchemaError if the value or one of its entries is not allowed; ``where`` is the path of the value."""
        try:
            self._check(value)
        except _MismatchError as error:
            raise SchemaError(f"{reduce(child, reversed(error.keys), where)}: {error}") from None

    def _check(self, value: Any) -> None:
        if not self.accepts(value):
            raise _MismatchError(f"expected {self}; found {shown(value)}")
        for key, field_of_entry, entry in self.entries(value):
            try:
                field_of_entry._check(entry)
            except _MismatchError as error:
                error.keys.append(key)
                raise


@dataclass(frozen=True)
class Whole(Field):
    """An integer from ``low`` to ``high``; floats and booleans are not allowed."""

    low: int = 0
    high: int = 2**31 - 1

    def accepts(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Number(Field):
    """A number from ``low`` to ``high``, greater than ``above`` and less than ``below``, finite by default."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    finite: bool = True

    def accepts(self, value: Any) -> bool:
        if type(value) not in (int, float):
            return False
        if not -sys.float_info.max <= value <= sys.float_info.max:  # NaN and infinities, and integers too large
            return not self.finite and isinstance(value, float)
        return bool(self.low <= value <= self.high and self.above < value < self.below)

    def __str__(self) -> str:
        limits = ("at least", self.low), ("at most", self.high), ("greater than", self.above), ("less than", self.below)
        bounds = [f"{words} {limit:g}" for words, limit in limits if math.isfinite(limit)]
        return " ".join(["a finite number" if self.finite else "a number", " and ".join(bounds)]).strip()


@dataclass(frozen=True)
class Text(Field):
    """A string of at most ``longest`` characters."""

    longest: int = 10_000

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and len(value) <= self.longest

    def __str__(self) -> str:
        return f"text of at most {self.longest} characters"


class Flag(Field):
    """True or false."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


class Anything(Field):
    """Any value that ``safe_json.parse`` returns."""

    def accepts(self, value: Any) -> bool:
        return True

    def __str__(self) -> str:
        return "any value"


@dataclass(frozen=True)
class OneOf(Field):
    """One of the strings ``known``."""

    known: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.known

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.known))}"


@dataclass(frozen=True)
class Maybe(Field):
    """Null, or a value that ``field`` allows."""

    field: Field

    def accepts(self, value: Any) -> bool:
        return value is None or self.field.accepts(value)

    def entries(self, value: Any) -> Iterator[tuple[str | int, Field, Any]]:
        return iter(()) if value is None else self.field.entries(value)

    def __str__(self) -> str:
        return f"{self.field} or null"


@dataclass(frozen=True)
class ListOf(Field):
    """A list of ``shortest`` to ``longest`` entries that ``item`` allows."""

    item: Field
    shortest: int = 0
    longest: int = 2**31 - 1

    def accepts(self, value: Any) -> bool:
        return isinstance(value, list) and self.shortest <= len(value) <= self.longest

    def entries(self, value: Any) -> Iterator[tuple[str | int, Field, Any]]:
        return ((i, self.item, entry) for i, entry in enumerate(value))

    def __str__(self) -> str:
        count = self.shortest if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        return f"a list of {count} entries"


@dataclass(frozen=True)
class MapOf(Field):
    """An object of at most ``longest`` entries that ``item`` allows, with any keys."""

    item: Field
    longest: int = 65_536

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict) and len(value) <= self.longest

    def entries(self, value: Any) -> Iterator[tuple[str | int, Field, Any]]:
        return ((key, self.item, entry) for key, entry in value.items())

    def __str__(self) -> str:
        return f"an object of at most {self.longest} entries"


@dataclass(frozen=True)
class Record(Field):
    """An object with the entries ``required``, any of ``optional``, and others that ``others`` allows."""

    required: Mapping[str, Field] = field(default_factory=dict)
    optional: Mapping[str, Field] = field(default_factory=dict)
    others: Field | None = None

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict)

    def entries(self, value: Any) -> Iterator[tuple[str | int, Field, Any]]:
        missing = [name for name in self.required if name not in value]
        if missing:
            raise _MismatchError(f"the entry {missing[0]!r} is missing; found {shown(sorted(value))}")
        for key, entry in value.items():
            item = self.required.get(key) or self.optional.get(key) or self.others
            if item is None:
                known = ", ".join(map(repr, (*self.required, *self.optional)))
                raise _MismatchError(f"unknown entry {shown(key)}; known are {known}")
            yield key, item, entry

    def __str__(self) -> str:
        return "an object"
