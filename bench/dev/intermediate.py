"""Reads Triton's GPU dialect (TTGIR): layouts are decided there, and loops are still loops.

ir = parse(compiled.asm["ttgir"], names_of_arguments)
weights = tile_loads(ir, ("w_ptr",))
converted(ir, weights)  # layout conversions of weights within loops
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

# A place in Python: file, line, column.
Place = tuple[str, int, int]
# The address that these operations result in is that of their first operand.
_ADDRESSES = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.int_to_ptr", "tt.ptr_to_int", "tt.bitcast")
# These work element by element, or move elements as they are.
_BY_ELEMENT = ("arith.", "math.", "tt.fp_to_fp", "tt.bitcast", "tt.precise_", "tt.extern_", "tt.elementwise_inline_asm")
_MOVES = ("tt.trans", "tt.reshape", "tt.expand_dims", "tt.broadcast", "ttg.convert_layout", "ttg.local", "ttg.memdesc")
_LOADS = ("tt.load", "ttg.async_copy_global_to_local")
_PRODUCTS = ("tt.dot", "ttng.warp_group_dot")
_OP = re.compile(r'(?:(%\w+)(?::\d+)?(?:, %\w+)* = )?"?([a-z]+\.[\w.]+)"?(.*)')


class Op(NamedTuple):
    """An operation.

    Attributes:
        name: such as ``tt.load``.
        result: the (first) value that it defines, or "".
        operands: the values that it takes.
        types: the text of its types.
        depth: how many loops it lies in.
        place: where it comes from; within a function of its own, there.
    """

    name: str
    result: str
    operands: tuple[str, ...]
    types: str
    depth: int
    place: Place | None


class IR(NamedTuple):
    """A kernel.

    Attributes:
        ops: its operations, in order.
        by_result: these, by the value that they define.
        starts: where the variables of loops start from.
        arguments: the names of the kernel's arguments.
        warps: of a program.
    """

    ops: list[Op]
    by_result: dict[str, Op]
    starts: dict[str, str]
    arguments: dict[str, str]
    warps: int


class Tile(NamedTuple):
    """A tensor in registers or shared memory: its shape, bytes of an element, and the text of its layout."""

    shape: tuple[int, ...]
    item: int
    layout: str


class _Names:
    """Unique names for values: siblings among regions use the same ones."""

    def __init__(self) -> None:
        self._scopes: list[dict[str, str]] = [{}]
        self._count = 0

    def define(self, name: str) -> str:
        self._count += 1
        return self._scopes[-1].setdefault(name, f"{name}.{self._count}")

    def get(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), name)

    def enter(self) -> None:
        self._scopes.append({})

    def leave(self) -> None:
        self._scopes.pop()


def parse(text: str, arguments: Sequence[str] = ()) -> IR:
    """Returns a kernel's operations; ``arguments`` are the names of those that it has at run time."""
    layouts = dict(re.findall(r"^(#\w+) = (#tt\w+\..*)$", text, re.M))
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))
    ops: list[Op] = []
    starts: dict[str, str] = {}
    regions: list[str] = []
    names = _Names()
    for line in text.splitlines():
        code, _, location = line.strip().partition(" loc(")
        if code.startswith("}"):
            regions.pop()
            names.leave()
        found = None if line.startswith(("#", "module")) else _OP.match(code)
        carried: list[tuple[str, str]] = []
        if found:
            body, _, types = re.sub(r"(?<!<)\{[^{}]*\}", "", found[3]).partition(" : ")
            carried = re.findall(r"(%\w+) = (%\w+)", body.partition("iter_args")[2])
            values = tuple(names.get(value) for value in re.findall(r"%\w+", body))
            types = re.sub(r"#\w+\b(?!\.)", lambda name: layouts.get(name[0], name[0]), types)
            depth = sum(name in ("scf.for", "scf.while") for name in regions)
            result = names.define(found[1]) if found[1] else ""
            ops.append(Op(found[2], result, values, types, depth, _place(location[:-1], locations)))
        if line.rstrip().endswith("{"):
            regions.append(found[2] if found else "")
            begins = [names.get(start) for _, start in carried]
            names.enter()
            starts |= {names.define(name): begin for (name, _), begin in zip(carried, begins, strict=True)}
    header = text.partition("tt.func")[2].partition("\n")[0]
    named = dict(zip(re.findall(r"(%\w+): ", header), arguments, strict=False))
    warps = int(re.findall(r'"ttg.num-warps" = (\d+)', text)[0])
    return IR(ops, {op.result: op for op in ops if op.result}, starts, named, warps)


def _place(location: str, locations: dict[str, str]) -> Place | None:
    while "#loc" in location:
        location = locations.get(re.findall(r"#loc\d*", location)[0], "")  # of a call, first the place in the callee
    found = re.search(r'"(.+)":(\d+):(\d+)', location)
    return (found[1], int(found[2]), int(found[3])) if found else None


def tiles(types: str) -> list[Tile]:
    """Returns the tensors that a text of types names; tensors of pointers with the size of what these point to."""
    found = []
    for start in re.finditer(r"(?:tensor|memdesc)<((?:\d+x)+)(?:!tt\.ptr<)?[a-z]+(\d+)\w*>?, ", types):
        depth, end = 1, start.end()
        while depth and end < len(types):
            depth += {"<": 1, ">": -1}.get(types[end], 0)
            end += 1
        shape = tuple(map(int, start[1].split("x")[:-1]))
        found.append(Tile(shape, max(1, int(start[2]) // 8), types[start.end() : end - 1]))
    return found


def tile_loads(ir: IR, arguments: Collection[str]) -> list[Op]:
    """Returns the loads of tensors of two or more dimensions through these arguments, or through addresses that were
    loaded through them.
    """
    loads = [op for op in ir.ops if op.name in _LOADS and any(len(tile.shape) > 1 for tile in tiles(op.types))]
    return [op for op in loads if _base(ir, op.operands[0]) in arguments]


def _base(ir: IR, value: str) -> str:
    """Returns the argument that an address derives from, or "" where it derives from several."""
    while value not in ir.arguments:
        op = ir.by_result.get(value)
        if op is None:
            if value not in ir.starts:
                return ""
            value = ir.starts[value]
        elif op.name in (*_ADDRESSES, *_LOADS, "ttg.convert_layout"):
            value = op.operands[0]
        else:
            return ""
    return ir.arguments[value]


def vectors(ir: IR, load: Op) -> tuple[int, int]:
    """Returns how many bytes a thread can load at a time of its share of a tile, at most 16, and how often it must."""
    tile = tiles(load.types)[0]
    share = tile.item
    for length in tile.shape:
        share *= length
    share //= 32 * ir.warps
    width = min(16, max(4, share))
    return width, max(1, share // width)


def converted(ir: IR, loads: Collection[Op]) -> list[Op]:
    """Returns the conversions of layout, within loops, of what these loads bring and of what is computed from that
    element by element. Those into the layout of a matrix product's operand do not count: it has no other.
    """
    values = {op.result if op.name == "tt.load" else _memory(ir, op.operands[1]) for op in loads}
    found = []
    for op in ir.ops:
        values |= {variable for variable, start in ir.starts.items() if start in values}
        if not values.isdisjoint(op.operands) and op.name.startswith((*_BY_ELEMENT, *_MOVES)):
            values.add(op.result)
            large = [tile for tile in tiles(op.types) if sum(size > 1 for size in tile.shape) > 1]
            if op.name == "ttg.convert_layout" and op.depth and large and "dot_op" not in large[-1].layout:
                found.append(op)
    return found


def _memory(ir: IR, value: str) -> str:
    """Returns the allocation that a part of shared memory belongs to."""
    while value in ir.by_result and ir.by_result[value].name.startswith("ttg.memdesc_"):
        value = ir.by_result[value].operands[0]
    return value


def operand_loads(ir: IR) -> list[Op]:
    """Returns the loads of matrix products' operands from shared memory into registers."""
    taken = {value for op in ir.ops if op.name in _PRODUCTS for value in op.operands}
    return [op for op in ir.ops if op.name == "ttg.local_load" and (op.result in taken or "dot_op" in op.types)]
