"""How often each loop and branch of a kernel runs in a program: a launch's control flow, without a GPU.

Triton's intermediate code (``asm["ttir"]``) becomes a Python function of what loop bounds and conditions depend on. It
is called for single programs with the launch's own arguments and work lists, which recording keeps in this machine's
memory.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastmaf.bench.dev import ttir
from fastmaf.bench.dev.ttir import TYPES, Op

# Loop iterations and branches that are evaluated of one launch, at most, after its first program: a second or two.
MOST = 300_000

_OPERATORS = {"addi": "+", "subi": "-", "muli": "*", "andi": "&", "ori": "|", "xori": "^", "shli": "<<", "shrsi": ">>"}
_CALLS = {"divsi": "quotient", "remsi": "remainder", "minsi": "np.minimum", "maxsi": "np.maximum", "select": "where"}
_COMPARE = {"eq": "==", "ne": "!=", "slt": "<", "sle": "<=", "sgt": ">", "sge": ">="}
_COMPARE |= {"ult": "<", "ule": "<=", "ugt": ">", "uge": ">="}
_SAME = ("extsi", "extui", "trunci", "index_cast", "splat", "broadcast", "int_to_ptr", "ptr_to_int", "bitcast")


class Region(NamedTuple):
    """A loop's body or a branch's side: its lines of the source, and those of the operations directly in it."""

    kind: str
    lines: tuple[str, ...]
    inside: frozenset[tuple[str, ...]]


class ControlFlow:
    """A kernel's loops and branches.

    Args:
        code: Triton's intermediate code.

    Attributes:
        regions: bodies of loops and sides of branches, in the order of the code.
        source: the Python function that counts them.
    """

    def __init__(self, code: str) -> None:
        names, ops = ttir.parse(code)
        self.regions: list[Region] = []
        self._needed: set[str] = set()
        before = -1
        while before != len(self._needed):
            before = len(self._needed)
            self._slice(ops, [])
        lines = [f"{', '.join(map(_python, names))}, = arguments", *self._emit(ops, [])]
        counts = f"counts = [0] * {len(self.regions)}"
        self.source = "\n    ".join(["def run(program, grid, arguments):", counts, *lines, "return counts"])
        made: dict[str, Any] = {"np": np} | {f.__name__: f for f in ttir.FUNCTIONS}
        exec(self.source, made)
        self._run: Callable[[int, int, Sequence[Any]], list[int]] = made["run"]

    def counts(self, arguments: Sequence[Any], grid: int) -> tuple[list[int], np.ndarray]:
        """Returns which programs of a launch were evaluated, and how often each runs each of ``regions``.

        Args:
            arguments: of the kernel, without its constants; addresses of tensors.
            grid: number of programs. They are all evaluated where that takes few steps.
        """
        stride = next(step for step in range(max(1, int(0.618 * grid)), 2 * grid + 1) if math.gcd(step, grid) == 1)
        found, steps = {}, 0
        for i in range(grid):
            found[i * stride % grid] = counts = self._run(i * stride % grid, grid, arguments)
            steps += 5 + sum(counts)
            if steps > MOST:
                break
        programs = sorted(found)
        return programs, np.array([found[program] for program in programs]).reshape(len(programs), -1)

    def _slice(self, ops: list[Op], results: list[str]) -> None:
        """Adds to the values on which control flow depends; ``results`` are those of the operation around."""
        need = self._needed.update
        for op in ops:
            if op.name in ("scf.for", "scf.while"):
                inner, start, bounds = _carried(op)
                need(bounds)
                for names in zip(op.results, inner, start, strict=False):
                    if op.name == "scf.while" or self._needed & set(names[:2]):
                        need(names)
                for region in op.regions:
                    self._slice(region, inner)
            elif op.name == "scf.if":
                need(op.uses()[:1])
                for region in op.regions:
                    self._slice(region, op.results)
            elif op.name == "scf.condition":
                need(op.uses())
            elif op.name == "scf.yield":
                need(use for use, result in zip(op.uses(), results, strict=False) if result in self._needed)
            elif self._needed & set(op.results):
                need(op.uses())

    def _emit(self, ops: list[Op], results: list[str]) -> Iterator[str]:
        for op in ops:
            if op.name in ("scf.for", "scf.while"):
                yield from self._emit_loop(op)
            elif op.name == "scf.if":
                for word, region in zip((f"if {_python(op.uses()[0])}:", "else:"), op.regions, strict=False):
                    yield word
                    yield f"    {self._count(op, region)}"
                    yield from (f"    {line}" for line in self._emit(region, op.results))
            elif op.name in ("scf.yield", "scf.condition"):
                if op.name == "scf.condition":
                    values = op.uses()[1:]
                    yield from (f"{_python(a)} = {_python(b)}" for a, b in zip(results, values, strict=False))
                    yield f"if not {_python(op.uses()[0])}: break"
                    continue
                pairs = [(a, b) for a, b in zip(results, op.uses(), strict=False) if a in self._needed]
                if pairs:
                    yield f"{', '.join(_python(a) for a, _ in pairs)} = {', '.join(_python(b) for _, b in pairs)}"
            elif self._needed & set(op.results) and op.name != "arguments":
                yield f"{_python(op.results[0])} = {_expression(op)}"

    def _count(self, op: Op, region: list[Op]) -> str:
        self.regions.append(Region(op.name, op.lines, frozenset(inner.lines for inner in region)))
        return f"counts[{len(self.regions) - 1}] += 1"

    def _emit_loop(self, op: Op) -> Iterator[str]:
        inner, start, bounds = _carried(op)
        yield from (f"{_python(a)} = {_python(b)}" for a, b in zip(inner, start, strict=True) if a in self._needed)
        if op.name == "scf.while":
            values = [f"{name}_" for name in inner]
            yield "while True:"
            yield from (f"    {line}" for line in self._emit(op.regions[0], values))
            after = next((one.results for one in op.regions[1] if one.name == "arguments"), inner)
            yield f"    {self._count(op, op.regions[1])}"
            yield from (f"    {_python(a)} = {_python(b)}" for a, b in zip(after, values, strict=True))
            yield from (f"    {line}" for line in self._emit(op.regions[1], inner))
            yield from (f"{_python(a)} = {_python(b)}" for a, b in zip(op.results, values, strict=True))
            return
        variable, *limits = op.uses()[:4]
        trips = f"range({', '.join(map(_python, limits))})"
        count = self._count(op, op.regions[0])
        body = list(self._emit(op.regions[0], inner))
        if body:
            yield from (f"for {_python(variable)} in {trips}:", f"    {count}", *(f"    {line}" for line in body))
        else:
            yield f"{count.removesuffix('1')}len({trips})"
        pairs = zip(op.results, inner, strict=False)
        yield from (f"{_python(a)} = {_python(b)}" for a, b in pairs if a in self._needed)


def _carried(op: Op) -> tuple[list[str], list[str], list[str]]:
    """Returns what a loop carries, where it starts, and the loop's bounds."""
    text = op.text.split("iter_args(")[-1].split(") ->")[0] if op.name == "scf.for" else op.text.split(") :")[0]
    has = op.name == "scf.while" or "iter_args(" in op.text
    pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", text) if has else []
    return [a for a, _ in pairs], [b for _, b in pairs], op.uses()[1:4] if op.name == "scf.for" else []


def _python(name: str) -> str:
    return name[1:]


def _expression(op: Op) -> str:
    """Returns the Python expression of an operation.

    Raises:
        NotImplementedError: it is none of those that loop bounds have needed so far.
    """
    dialect, _, name = op.name.partition(".")
    uses = [_python(use) for use in op.uses()]
    if name == "constant":
        value = re.sub(r"dense<(.*)>", r"\1", op.text.split(" : ")[0].strip())
        value = {"true": "1", "false": "0"}.get(value, value)
        shape = re.search(r"tensor<((?:\d+x)+)", op.text)
        return f"np.full({_shape(op.text)}, {value})" if shape else value
    if name in _SAME:
        return uses[0] if name != "broadcast" else f"np.broadcast_to({uses[0]}, {_shape(op.text.split(' -> ')[1])})"
    if name in _OPERATORS:
        return f"{uses[0]} {_OPERATORS[name]} {uses[1]}"
    if name in _CALLS:
        call = _CALLS[name] if "tensor<" in op.text else _CALLS[name].removeprefix("np.").removesuffix("imum")
        return f"{call}({', '.join(uses)})"
    if name == "cmpi":
        return f"({uses[0]} {_COMPARE[op.text.split(',')[0].strip()]} {uses[1]})"
    if name in ("get_program_id", "get_num_programs"):
        return "program" if name == "get_program_id" else "grid"
    if name == "make_range":
        return f"np.arange({_attribute(op, 'start')}, {_attribute(op, 'end')})"
    if name == "expand_dims":
        return f"np.expand_dims({uses[0]}, {_attribute(op, 'axis')})"
    if name == "addptr":
        return f"{uses[0]} + {uses[1]} * {_size(op.text)}"
    if name == "load":
        return f"load({_element(op.text)!r}, {', '.join(uses)})"
    if name == "reduce":
        inner = next(one.name.partition(".")[2] for one in op.regions[0] if one.name.startswith("arith."))
        return f"reduced({inner!r}, {uses[0]}, {_attribute(op, 'axis')})"
    raise NotImplementedError(f"a loop bound depends on {dialect}.{name}: {op.text}")


def _attribute(op: Op, name: str) -> int:
    found = re.search(rf"{name} = (\d+)", op.text)
    assert found is not None, op.text
    return int(found[1])


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.search(r"tensor<((?:\d+x)+)", text)[1].split("x")[:-1]))  # type: ignore[index]


def _element(text: str) -> str:
    """Returns the type to which the first pointer of a text points."""
    found = re.search(r"!tt\.ptr<(!?\w+)", text)
    assert found is not None, text
    return found[1].removeprefix("!tt.") if found[1] in TYPES else "ptr" if found[1].startswith("!") else found[1]


def _size(text: str) -> int:
    element = _element(text)
    return ctypes.sizeof(TYPES[element]) if element in TYPES else {"bf16": 2, "f16": 2}.get(element, 1)
