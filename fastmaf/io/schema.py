"""What the values of a JSON document may be: a description of each entry, and the check of a document against it.

POINT = Record({"x": Number(), "label": Maybe(Text())})
POINT.check({"x": 1.5, "label": 3}, "point")   # SchemaError: point.label: expected text or null; found 3
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastmaf.io.safe_json import child, shown


class SchemaError(ValueError):
    """A value is not what the schema allows; the message says where it is, what was expected and what was found."""


class Field(ABC):
    """What one value may be. ``str(field)`` completes "expected ..."."""

    @abstractmethod
    def accepts(self, value: Any) -> bool:
        """Whether the value is of the right type and in range, its entries aside."""

    def check(self, value: Any, where: str) -> None:
        """Raises SchemaError unless the value, with all that it holds, is allowed; ``where`` is its path."""
        if not self.accepts(value):
            raise SchemaError(f"{where}: expected {self}; found {shown(value)}")


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
        if not self.finite and not math.isfinite(value):
            return True
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

    def check(self, value: Any, where: str) -> None:
        super().check(value, where)
        if value is not None:
            self.field.check(value, where)

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

    def check(self, value: Any, where: str) -> None:
        super().check(value, where)
        for i, found in enumerate(value):
            self.item.check(found, child(where, i))

    def __str__(self) -> str:
        count = self.shortest if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        return f"a list of {count} entries"


@dataclass(frozen=True)
class MapOf(Field):
    """An object whose values ``item`` allows, under any names."""

    item: Field

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict)

    def check(self, value: Any, where: str) -> None:
        super().check(value, where)
        for key, found in value.items():
            self.item.check(found, child(where, key))

    def __str__(self) -> str:
        return "an object"


@dataclass(frozen=True)
class Record(Field):
    """An object with the entries ``required``, some of ``optional``, and no others unless they are ``others``."""

    required: Mapping[str, Field] = field(default_factory=dict)
    optional: Mapping[str, Field] = field(default_factory=dict)
    others: Field | None = None

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict)

    def check(self, value: Any, where: str) -> None:
        super().check(value, where)
        missing = [name for name in self.required if name not in value]
        if missing:
            raise SchemaError(f"{where}: the entry {missing[0]!r} is missing; found {shown(sorted(value))}")
        for key, found in value.items():
            item = self.required.get(key) or self.optional.get(key) or self.others
            if item is None:
                known = ", ".join(map(repr, (*self.required, *self.optional)))
                raise SchemaError(f"{where}: unknown entry {shown(key)}; known are {known}")
            item.check(found, child(where, key))

    def __str__(self) -> str:
        return "an object"
