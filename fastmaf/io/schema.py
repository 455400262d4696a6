"""What the values of a JSON document may be: a description of each entry, and the check of a document against it.

POINT = Record({"x": Number(), "label": Maybe(Text())})
POINT.check({"x": 1.5, "label": 3}, "point")   # SchemaError: point.label: expected text or null; found 3
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
    """A value is not what the schema allows; the message says where it is, what was expected and what was found."""


class _MismatchError(Exception):
    """What is wrong, and the keys that lead to it, the innermost first."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.keys: list[str | int] = []


class Field(ABC):
    """What one value may be. ``str(field)`` completes "expected ..."."""

    @abstractmethod
    def accepts(self, value: Any) -> bool:
        """Whether the value is of the right type and in range, its entries aside."""

    def entries(self, value: Any) -> Iterator[tuple[str | int, Field, Any]]:
        """Yields key, field and value of each entry of a value that is accepted."""
        yield from ()

    def check(self, value: Any, where: str) -> None:
        """Raises SchemaError unless the value, with all that it holds, is allowed; ``where`` is its path."""
        try:
            self._check(value)
        except _MismatchError as error:
            raise SchemaError(f"{reduce(child, reversed(error.keys), where)}: {error}") from None

    def _check(self, value: Any) -> None:
        if not self.accepts(value):
            raise _MismatchError(f"expected {self}; found {shown(value)}")
        for key, item, found in self.entries(value):
            try:
                item._check(found)
            except _MismatchError as error:
                error.keys.append(key)
                raise


@dataclass(frozen=True)
class Whole(Field):
    """A whole number from ``low`` to ``high``; neither a float without a fraction nor a boolean."""

    low: int = 0
    high: int = 2**31 - 1

    def accepts(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Number(Field):
    """A number, at least ``low``, at most ``high``, greater than ``above``, less than ``below``, finite or also not."""

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
        said = [f"{words} {limit:g}" for words, limit in limits if math.isfinite(limit)]
        return " ".join(["a finite number" if self.finite else "a number", " and ".join(said)]).strip()


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
    """Any JSON: what ``safe_json.parse`` lets through."""

    def accepts(self, value: Any) -> bool:
        return True

    def __str__(self) -> str:
        return "any value"


@dataclass(frozen=True)
class OneOf(Field):
    """One of a few strings."""

    known: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.known

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.known))}"


@dataclass(frozen=True)
class Maybe(Field):
    """Null, or what ``field`` allows."""

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
        return ((i, self.item, found) for i, found in enumerate(value))

    def __str__(self) -> str:
        count = self.shortest if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        return f"a list of {count} entries"


@dataclass(frozen=True)
class MapOf(Field):
    """An object of at most ``longest`` entries that ``item`` allows, under any names."""

    item: Field
    longest: int = 65_536

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict) and len(value) <= self.longest

    def entries(self, value: Any) -> Iterator[tuple[str | int, Field, Any]]:
        return ((key, self.item, found) for key, found in value.items())

    def __str__(self) -> str:
        return f"an object of at most {self.longest} entries"


@dataclass(frozen=True)
class Record(Field):
    """An object with the entries ``required``, some of ``optional``, and no others unless they are ``others``."""

    required: Mapping[str, Field] = field(default_factory=dict)
    optional: Mapping[str, Field] = field(default_factory=dict)
    others: Field | None = None

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict)

    def entries(self, value: Any) -> Iterator[tuple[str | int, Field, Any]]:
        missing = [name for name in self.required if name not in value]
        if missing:
            raise _MismatchError(f"the entry {missing[0]!r} is missing; found {shown(sorted(value))}")
        for key, found in value.items():
            item = self.required.get(key) or self.optional.get(key) or self.others
            if item is None:
                known = ", ".join(map(repr, (*self.required, *self.optional)))
                raise _MismatchError(f"unknown entry {shown(key)}; known are {known}")
            yield key, item, found

    def __str__(self) -> str:
        return "an object"
