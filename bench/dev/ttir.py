"""Triton's intermediate code (``asm["ttir"]``) as operations with nested regions, and what some of them compute."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
TYPES: dict[str, Any] = {
    "i1": ctypes.c_bool,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
}
TYPES |= {"f32": ctypes.c_float, "f64": ctypes.c_double, "ptr": ctypes.c_int64}
_RESULTS = re.compile(r"^(%\S+(?:, %\S+)*) = (.*)$")
_PLACE = re.compile(r" loc\((#\w+|unknown|callsite\(.*\))\)$")


class Op(NamedTuple):
    """An operation: its results, name, text behind the name, regions, and lines of the source, innermost call first."""

    results: list[str]
    name: str
    text: str
    regions: list[list[Op]]
    lines: tuple[str, ...]

    def uses(self) -> list[str]:
        """Returns the values in its text."""
        return NAME.findall(self.text)


def parse(ttir: str) -> tuple[list[str], list[Op]]:
    """Returns a kernel's parameters and operations; every value has a name of its own."""
    parameters, _, body = re.split(r"^ *tt\.func ", ttir, maxsplit=1, flags=re.M)[1].partition("\n")
    parser = _Parser(dict(re.findall(r"^(#\w+) = loc\((.*)\)$", ttir, re.M)))
    scope = parser.defined(re.findall(r"(%[\w$.-]+): ", parameters), {})
    names = list(scope.values())
    return names, parser.renamed(parser.parse(iter(body.splitlines()))[0], scope)


class _Parser:
    """Reads operations; ``places`` are locations in the source by name."""

    def __init__(self, places: dict[str, str]) -> None:
        self._places, self._names = places, itertools.count()

    def _lines(self, place: str) -> tuple[str, ...]:
        place = self._places.get(place, place)
        if place.startswith("callsite("):
            inner, _, outer = place[len("callsite(") : -1].rpartition(" at ")
            return self._lines(inner) + self._lines(outer)
        if match := re.fullmatch(r'"[^"]*"\((.*)\)', place):
            return self._lines(match[1])
        match = re.match(r'"([^"]*)":(\d+):', place)
        return (f"{match[1].rpartition('/')[2]}:{match[2]}",) if match else ()

    def parse(self, lines: Iterator[str]) -> tuple[list[Op], str]:
        """Returns the operations up to the end of a region, and the line that ends it."""
        ops: list[Op] = []
        for line in map(str.strip, lines):
            if line.startswith("}"):
                return ops, line
            if line.startswith("^"):
                ops.append(Op(re.findall(r"(%[\w$.-]+):", line), "arguments", "", [], ()))
                continue
            match = _RESULTS.match(text := _PLACE.sub("", line))
            results = match[1].split(", ") if match else []
            if results and ":" in results[0]:
                name, _, count = results[0].partition(":")
                results = [f"{name}#{i}" for i in range(int(count))]
            name, _, text = (match[2] if match else text).replace('"', "", 2).partition(" ")
            name, _, first = name.partition("(")
            regions: list[list[Op]] = []
            end = line
            while end.endswith("{"):
                inner, end = self.parse(lines)
                regions.append(inner)
            place = _PLACE.search(end)
            source = self._lines(place[1]) if place else ()
            ops.append(Op(results, name, f"{first} {text} {end if regions else ''}", regions, source))
        return ops, ""

    def defined(self, names: Sequence[str], scope: dict[str, str]) -> dict[str, str]:
        """Adds names to a scope, and returns it: regions beside each other may use one name for several values."""
        for name in names:
            scope[name] = f"%v{next(self._names)}"
        return scope

    def renamed(self, ops: list[Op], outer: dict[str, str]) -> list[Op]:
        """Returns the operations with a name of its own for every value."""
        scope, found = dict(outer), []
        for op in ops:
            inner = self.defined(re.findall(r"(%[\w$.-]+) =", op.text), dict(scope))
            names = {f"{name} =": f"{new} =" for name, new in inner.items()} | scope
            text = _replaced(op.text, names)
            self.defined(op.results, scope)
            results = [scope[name] for name in op.results]
            if op.name == "arguments":
                found.append(op._replace(results=results))
                continue
            regions = [self.renamed(region, inner) for region in op.regions]
            found.append(op._replace(results=results, text=text, regions=regions))
        return found


def _replaced(text: str, names: dict[str, str]) -> str:
    """Returns a text with values replaced; those that it defines stand before an equals sign."""
    return re.sub(f"{NAME.pattern}(?: =)?", lambda match: names.get(match[0], match[0]), text)


def load(element: str, address: Any, mask: Any = None, other: Any = 0) -> Any:
    """Returns what lies at an address, or at each of an array of addresses, of this machine."""
    kind = TYPES[element]
    if not isinstance(address, np.ndarray):
        return kind.from_address(int(address)).value if mask is None or mask else other
    masks, others = np.broadcast_arrays(address, True if mask is None else mask, other)[1:]
    flat = zip(address.ravel().tolist(), masks.ravel().tolist(), others.ravel().tolist(), strict=True)
    return np.array([kind.from_address(a).value if ok else b for a, ok, b in flat]).reshape(address.shape)


def quotient(a: Any, b: Any) -> Any:
    """Returns a / b, rounded towards zero."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.sign(a) * np.sign(b) * (abs(a) // abs(b))
    return a // b if (a < 0) == (b < 0) else -(-a // b)


def remainder(a: Any, b: Any) -> Any:
    """Returns what ``quotient`` leaves."""
    return a - b * quotient(a, b)


def where(condition: Any, a: Any, b: Any) -> Any:
    """Returns a or b."""
    return np.where(condition, a, b) if isinstance(condition, np.ndarray) else a if condition else b


def reduced(name: str, values: np.ndarray, axis: int) -> Any:
    """Returns the reduction of an array over an axis."""
    found = {"addi": np.add, "maxsi": np.maximum, "minsi": np.minimum}[name].reduce(values, axis)
    return found if np.ndim(found) else int(found)


# In Python code made of operations, by their names.
FUNCTIONS = (load, quotient, remainder, where, reduced)
