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
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import triton

Kind: TypeAlias = Literal[
    "float", "double", "tensor", "special", "integer", "constant", "shuffle", "barrier", "branch",
    "load_global", "store_global", "copy_async", "load_shared", "store_shared", "load_local", "store_local",
]  # fmt: skip

# By the first word of an opcode; what is not here works on integers, predicates or registers.
_KINDS: dict[str, Kind] = {}
_NAMES: dict[Kind, str] = {
    "float": "FFMA FMUL FADD FFMA32I FMUL32I FADD32I",
    "double": "DADD DMUL DFMA DSETP",
    "tensor": "HMMA IMMA DMMA BMMA HGMMA QGMMA IGMMA",
    "special": "MUFU RRO F2F FRND F2I I2F I2I POPC FLO",
    "constant": "LDC ULDC",
    "shuffle": "SHFL REDUX CREDUX",
    "barrier": "BAR",
    "branch": "BRA BRX JMP SYNC BSYNC EXIT RET CALL BREAK BRK",
    "load_global": "LDG LD ATOM ATOMG",
    "store_global": "STG ST RED",
    "copy_async": "LDGSTS UBLKCP UTMALDG",
    "load_shared": "LDS LDSM ATOMS",
    "store_shared": "STS STSM",
    "load_local": "LDL",
    "store_local": "STL",
}
for _kind, _names in _NAMES.items():
    _KINDS |= dict.fromkeys(_names.split(), _kind)

_MEMORY = {"load_global", "store_global", "copy_async", "load_shared", "store_shared", "load_local", "store_local"}
_LABEL = re.compile(r"^(\.L_\w+|\$?[\w$]+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s*\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*)")
_WORD = re.compile(r"/\* (0x[0-9a-f]{16}) \*/")
_PLACE = re.compile(r'"([^"]+)", line (\d+)')


class Instruction(NamedTuple):
    """An instruction of a warp.

    Attributes:
        address: in bytes.
        opcode: with its modifiers, such as ``LDG.E.128``.
        kind: its class.
        guarded: whether a predicate decides if it is executed.
        size: bytes that a thread moves, of accesses to memory; else 0.
        target: address of the instruction to which it may branch, or None.
        stall: cycles before the warp's next instruction.
        sets: scoreboards that it sets, until its result is there or its operands are read.
        waits: scoreboards that it waits for.
        operands: as disassembled.
        lines: ``file.py:line`` of the source, the innermost call first; empty where nothing is known.
    """

    address: int
    opcode: str
    kind: Kind
    guarded: bool
    size: int
    target: int | None
    stall: int
    sets: tuple[int, ...]
    waits: tuple[int, ...]
    operands: str
    lines: tuple[str, ...]


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


class MachineCode(NamedTuple):
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

    def innermost(self) -> list[int | None]:
        """Returns the number of the innermost loop of each block, or None."""
        found: list[int | None] = [None] * len(self.blocks)
        for number, loop in enumerate(self.loops):  # inner loops come later
            for block in loop.blocks:
                found[block] = number
        return found


def kind_of(opcode: str) -> Kind:
    """Returns the class of an opcode."""
    return _KINDS.get(opcode.split(".")[0], "integer")


def size_of(opcode: str) -> int:
    """Returns how many bytes a thread moves by an access to memory."""
    words = opcode.split(".")[1:]
    if "M88" in words or "MT88" in words:  # one, two or four matrices of 8 x 8 numbers of 16 bits
        return 4 * int(words[-1] if words[-1] in ("2", "4") else "1")
    for word in words:
        if word in ("32", "64", "96", "128"):
            return int(word) // 8
        if word in ("U8", "S8", "U16", "S16"):
            return int(word[1:]) // 8
    return 4


def disassemble(cubin: bytes) -> MachineCode:
    """Returns the code of a compiled kernel.

    Raises:
        RuntimeError: no disassembler at hand knows the kernel's architecture.
    """
    registers = re.findall(r"REG:(\d+)", _run("cuobjdump", ["-res-usage"], cubin))
    return read(_run("nvdisasm", ["-c", "-hex", "-gi"], cubin), int(registers[0]))


def read(text: str, registers: int = 0) -> MachineCode:
    """Returns the code that ``nvdisasm -c -hex -gi`` printed as ``text``."""
    instructions = _parse(text)
    blocks = _blocks(instructions)
    return MachineCode(instructions, blocks, _loops(instructions, blocks), registers)


def _run(tool: str, options: list[str], cubin: bytes) -> str:
    """Returns the output of the first of Triton's tools that knows the architecture: newer ones forget old cards."""
    packages = [Path(triton.__file__).parent, *(Path(sys.prefix).glob("triton-*/triton"))]
    error = "none was found"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        for package in packages:
            if (program := package / "backends" / "nvidia" / "bin" / tool).exists():
                run = subprocess.run([str(program), *options, str(file)], capture_output=True, text=True)
                if run.returncode == 0:
                    return run.stdout
                error = run.stderr.strip()
    raise RuntimeError(f"no {tool} reads this kernel ({error}); the one of Triton 3.6 or older knows Pascal")


def _parse(text: str) -> list[Instruction]:
    words = [int(word, 16) for word in _WORD.findall(text)]  # in order of addresses, eight bytes each
    wide = not re.search(r"EF_CUDA_SM[56]\d", text)
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []  # labels of the next instruction
    targets: list[str | None] = []
    joins: dict[str, str] = {}  # by a barrier of divergent threads: where they join
    lines: list[str] = []
    last_was_line = False
    for line in text.splitlines():
        if match := _LABEL.match(line):
            pending.append(match[1])
        elif "//##" in line:
            if not last_was_line:
                lines = []
            lines += [f"{Path(file).name}:{number}" for file, number in _PLACE.findall(line)[:1]]
            last_was_line = True
            continue
        elif match := _INSTRUCTION.match(line):
            address, opcode, operands = int(match[1], 16), match[3], match[4]
            labels |= dict.fromkeys(pending, address)
            pending = []
            kind = kind_of(opcode)
            named = re.findall(r"\.L_\w+", operands)
            if opcode.startswith("BSSY") and named:
                joins[operands.split(",")[0].strip()] = named[0]
            if opcode.startswith("BSYNC") and not named:
                named = [joins[place] for place in joins if place in operands]
            targets.append(named[0] if kind == "branch" and named else None)
            stall, sets, waits = _scheduling(words, address, wide)
            size = size_of(opcode) if kind in _MEMORY else 0
            operands = re.split(r"\s*[;}]", operands)[0].strip()
            found.append(
                Instruction(
                    address, opcode, kind, match[2] is not None, size, None, stall, sets, waits, operands, tuple(lines)
                )
            )
        last_was_line = False
    return [
        one._replace(target=labels.get(target)) if target else one
        for one, target in zip(found, targets, strict=True)
    ]  # fmt: skip


def _scheduling(words: list[int], address: int, wide: bool) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Returns the stall, the scoreboards set and those waited for.

    From Volta on they lie in the upper half of an instruction; before, one word holds those of the three after it.
    """
    fields = words[address // 8 + 1] >> 41 if wide else words[address // 32 * 4] >> 21 * (address % 32 // 8 - 1)
    sets = {fields >> 5 & 7, fields >> 8 & 7} - {7}
    return fields & 15, tuple(sorted(sets)), tuple(i for i in range(6) if fields >> 11 + i & 1)


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
