"""The machine code of a compiled kernel: instructions by class, basic blocks, loops.

    from fastmaf.bench.dev import machine_code, resources

    [source, *_] = resources.sources(90, [8])
    code = machine_code.disassemble(resources.built(source, 90).asm["cubin"])
    for loop in code.loops:
        print(loop.depth, code.count(loop, "load_global", 16), code.count(loop, "barrier"))

Beside the instructions stand the scheduling fields that the assembler wrote into them: how long a warp stalls after
each, and which of its six scoreboards it sets or waits for. They hold all dependencies between instructions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fastmaf.bench.dev.disassembly import Instruction, Kind, parse, run_tool

WAIT = "ACQBULK"  # for the kernels before to end, of those that start early; a block of its own ends with it


class Block(NamedTuple):
    """A basic block: instructions ``start..end`` of the code, and the blocks that may follow it."""

    start: int
    end: int
    next: tuple[int, ...]


class Loop(NamedTuple):
    """A loop.

    Attributes:
        blocks: numbers of its basic blocks, in order, those of inner loops included.
        depth: 0 for outermost loops.
        parent: number of the loop around it, or None.
        lines: the source of its branch back.
    """

    blocks: tuple[int, ...]
    depth: int
    parent: int | None
    lines: tuple[str, ...]


@dataclass(frozen=True)
class MachineCode:
    """A kernel's code.

    Attributes:
        instructions: in order of addresses.
        blocks: those that are reached from the kernel's start without calls: the rest are slow paths of divisions.
        loops: in order of addresses, outer ones before those in them.
        registers: of a thread.
    """

    instructions: list[Instruction]
    blocks: list[Block]
    loops: list[Loop]
    registers: int

    def within(self, loop: Loop | None = None) -> Iterator[Instruction]:
        """Yields the instructions of a loop with its inner loops, or of the whole kernel."""
        for number in range(len(self.blocks)) if loop is None else loop.blocks:
            yield from self.instructions[self.blocks[number].start : self.blocks[number].end]

    def count(self, loop: Loop | None, kind: Kind, size: int | None = None) -> int:
        """Returns how many instructions of a kind, of ``size`` bytes if given, a loop or the whole kernel has."""
        return sum(one.kind == kind and size in (None, one.size) for one in self.within(loop))

    def waits(self, block: Block) -> bool:
        """Returns whether a block ends with the wait for the kernels before."""
        return self.instructions[block.end - 1].opcode.startswith(WAIT)

    def innermost(self) -> list[int | None]:
        """Returns the number of the innermost loop of each block, or None."""
        found: list[int | None] = [None] * len(self.blocks)
        for number, loop in enumerate(self.loops):  # inner loops come later
            for block in loop.blocks:
                found[block] = number
        return found


def disassemble(cubin: bytes) -> MachineCode:
    """Returns the code of a compiled kernel.

    Raises:
        RuntimeError: no disassembler at hand knows the kernel's architecture.
    """
    registers = re.findall(r"REG:(\d+)", run_tool("cuobjdump", ["-res-usage"], cubin))
    return read(run_tool("nvdisasm", ["-c", "-hex", "-gi"], cubin), int(registers[0]))


def read(text: str, registers: int = 0) -> MachineCode:
    """Returns the code that ``nvdisasm -c -hex -gi`` printed as ``text``."""
    instructions = parse(text)
    blocks = _blocks(instructions)
    return MachineCode(instructions, blocks, _loops(instructions, blocks), registers)


def _ends(one: Instruction) -> bool:
    """Returns whether nothing follows an instruction but its target."""
    return one.kind == "branch" and not one.guarded and not one.opcode.startswith("CALL")


def _blocks(instructions: list[Instruction]) -> list[Block]:
    at = {one.address: i for i, one in enumerate(instructions)}
    starts = {0}
    for i, one in enumerate(instructions):
        if one.kind == "branch" and not one.opcode.startswith("CALL"):
            starts.add(i + 1)
            if one.target is not None:
                starts.add(at[one.target])
        if one.opcode.startswith(WAIT):
            starts.add(i + 1)
    edges = sorted(start for start in starts if start < len(instructions))
    end_of = dict(zip(edges, [*edges[1:], len(instructions)], strict=True))

    def after(start: int) -> list[int]:
        last = instructions[end_of[start] - 1]
        places = [] if _ends(last) or end_of[start] == len(instructions) else [end_of[start]]
        if last.kind == "branch" and last.target is not None and not last.opcode.startswith("CALL"):
            places.append(at[last.target])
        return places

    reached, waiting = {0}, [0]
    while waiting:
        new = set(after(waiting.pop())) - reached
        reached |= new
        waiting += new
    order = {start: number for number, start in enumerate(sorted(reached))}
    return [Block(start, end_of[start], tuple(order[place] for place in after(start))) for start in order]


def _loops(instructions: list[Instruction], blocks: list[Block]) -> list[Loop]:
    before: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for place in block.next:
            before[place].append(number)
    bodies: dict[int, set[int]] = {}
    backs: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for head in (place for place in block.next if place <= number):
            body, waiting = bodies.setdefault(head, {head}), [number]
            while waiting:
                if (one := waiting.pop()) not in body and one > head:
                    body.add(one)
                    waiting += before[one]
            backs[head] = max(backs.get(head, 0), number)
    heads = sorted(bodies, key=lambda head: (head, -len(bodies[head])))
    loops: list[Loop] = []
    for head in heads:
        around = [i for i, loop in enumerate(loops) if head in loop.blocks]
        lines = instructions[blocks[backs[head]].end - 1].lines
        parent = around[-1] if around else None
        loops.append(Loop(tuple(sorted(bodies[head])), len(around), parent, lines))
    return loops
