"""What a kernel's program costs on a card: its dependent chain and the units that it keeps busy.

A basic block's chain is the time of one warp that runs alone, from the stalls and scoreboards in its instructions; its
units are what all warps of a program take from their multiprocessor. A program takes the longer of both, block by
block, as often as each block runs (``trip_counts``).
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from fastmaf.bench.dev import machine_code, resources
from fastmaf.bench.dev.cards import Card
from fastmaf.bench.dev.disassembly import Instruction
from fastmaf.bench.dev.lanes import Lanes, sectors, shared_cycles
from fastmaf.bench.dev.machine_code import MachineCode
from fastmaf.bench.dev.trip_counts import ControlFlow
from fastmaf.kernels.triton_common.device import Launched

# Units of a multiprocessor that are busy apart from each other; each class of instructions keeps one of them busy.
UNITS = ("issue", "float", "integer", "special", "double", "tensor", "shared", "global")
_UNIT = {"shuffle": "shared", "load_shared": "shared", "store_shared": "shared", "constant": "special"}
_UNIT |= {"load_global": "global", "store_global": "global", "copy_async": "global"}
_UNIT |= {"load_local": "global", "store_local": "global"}
_ISSUES = 4  # schedulers of a multiprocessor, one instruction a cycle each


class BlockCost(NamedTuple):
    """A basic block's cost, once.

    Attributes:
        near, far: cycles of a warp alone, with loads from the second-level cache or from memory.
        lines: of ``near``, the cycles that pass before each line's instructions, by the source's lines.
        units: cycles of each of ``UNITS`` for one warp.
        loaded, stored: bytes that a warp moves from and to the second-level cache.
    """

    near: float
    far: float
    lines: Counter[str]
    units: np.ndarray
    loaded: float
    stored: float


class Kernel(NamedTuple):
    """A compiled kernel.

    Attributes:
        code: its machine code.
        flow: its control flow.
        shared: bytes of shared memory of a program.
        warps: of a program.
        reaches: whether it loads addresses, so that it reads more than its arguments.
        waits: how many of the blocks come before its programs have waited for the kernels before; 0 if they do not.
        prefetches: whether programs ask for weights before that.
        blocks: the cost of each basic block.
        regions: of each basic block, which loop's or branch's count is its own; -1 where it runs once, -2 never.
    """

    code: MachineCode
    flow: ControlFlow
    shared: int
    warps: int
    reaches: bool
    waits: int
    prefetches: bool
    blocks: list[BlockCost]
    regions: list[int]

    @property
    def registers(self) -> int:
        """Of a program."""
        return -(-self.code.registers // 8) * 8 * 32 * self.warps

    def resident(self, card: Card) -> int:
        """Returns how many programs a multiprocessor holds at a time."""
        return max(1, min(65_536 // self.registers, card.warps // self.warps, 32, card.shared // (self.shared + 1024)))


_kernels: dict[tuple[str, str], Kernel] = {}


def kernel_of(launched: Launched, card: Card) -> Kernel:
    """Returns the kernel of a launch, compiled for a card; kept for the next launch like it."""
    source = resources.source_of(launched)
    if (key := (repr(source), card.name)) not in _kernels:
        _kernels[key] = _compiled(source, card)
    return _kernels[key]


def _compiled(source: resources.Source, card: Card) -> Kernel:
    built = resources.built(source, card.arch)
    code = machine_code.disassemble(built.asm["cubin"])
    flow = ControlFlow(built.asm["ttir"])
    reaches, data = "tt.int_to_ptr" in built.asm["ttir"], built.metadata
    waits = next((i + 1 for i, block in enumerate(code.blocks) if code.waits(block)), 0)
    prefetches = any(one.opcode.startswith("UBLKPF") for one in code.instructions)
    costs, regions = _costs(code, card), _regions(code, flow)
    return Kernel(code, flow, data.shared, data.num_warps, reaches, waits, prefetches, costs, regions)


def program_counts(kernel: Kernel, launched: Launched) -> np.ndarray:
    """Returns how often each program that was evaluated runs each basic block: ``[programs, blocks]``."""
    signature = resources.source_of(launched).signature
    values = resources.arguments(launched)
    given = [values[name] for name, kind in signature.items() if kind != "constexpr"]
    addresses = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given]
    programs, counts = kernel.flow.counts(addresses, launched.grid)
    known = np.concatenate([counts, np.zeros((len(programs), 1), int), np.ones((len(programs), 1), int)], 1)
    return known[:, kernel.regions]  # -1 is the last column, which is one; -2 the one before it


def _regions(code: MachineCode, flow: ControlFlow) -> list[int]:
    """Returns which region of the control flow each basic block belongs to."""
    lines = Counter[str]()
    of_loop = []
    for loop in code.loops:  # loops of one line of the source are in the same order in both
        line = loop.lines[0] if loop.lines else ""
        same = [i for i, region in enumerate(flow.regions) if region.kind != "scf.if" and region.lines[:1] == (line,)]
        if not same:
            raise NotImplementedError(f"a loop at {line or 'an unknown line'} is not one of the source")
        of_loop.append(same[min(lines[line], len(same) - 1)])
        lines[line] += 1
    branches = [(i, region) for i, region in enumerate(flow.regions) if region.kind == "scf.if"]
    found = []
    for number, inner in enumerate(code.innermost()):
        block = code.blocks[number]
        instructions = code.instructions[block.start : block.end]
        if any(one.opcode.startswith("CALL") for one in instructions):
            found.append(-2)  # the slow path of a division
            continue
        region = -1 if inner is None else of_loop[inner]
        votes = Counter(i for one in instructions for i, branch in branches if one.lines and one.lines in branch.inside)
        for i, count in votes.most_common(1):
            if 2 * count > len(instructions):
                region = i
        found.append(region)
    return found


def _costs(code: MachineCode, card: Card) -> list[BlockCost]:
    near, far = (_chains(code, card, latency) for latency in (card.near, card.far))
    lanes = Lanes(code)
    found = []
    for number, block in enumerate(code.blocks):
        units = dict.fromkeys(UNITS, 0.0)
        moved = {False: 0.0, True: 0.0}
        for i in range(block.start, block.end):
            one = code.instructions[i]
            units["issue"] += 1 / _ISSUES
            cycles = card.units(one)
            if one.kind in ("load_shared", "store_shared"):
                cycles = shared_cycles(one, lanes.addresses(i))
            elif one.kind in ("load_global", "store_global", "copy_async"):
                touched = sectors(one, lanes.addresses(i))
                moved[one.kind == "store_global"] += 32 * touched
                cycles = max(1.0, touched / 4)
            units[_UNIT.get(one.kind, one.kind if one.kind in UNITS else "integer")] += cycles
        busy = np.array([units[unit] for unit in UNITS])
        found.append(
            BlockCost(near[number].total(), far[number].total(), near[number], busy, moved[False], moved[True])
        )
    return found


def _chains(code: MachineCode, card: Card, load: int) -> list[Counter[str]]:
    """Returns the cycles of each block for a warp alone, by lines; of a loop's blocks those of its second iteration."""
    cycles = [Counter[str]() for _ in code.blocks]
    inner = code.innermost()
    clock = _Clock(card, load)

    def walk(blocks: list[int], around: int | None) -> None:
        at = 0
        while at < len(blocks):
            number = blocks[at]
            child = inner[number]
            while child is not None and child != around and code.loops[child].parent != around:
                child = code.loops[child].parent
            if child is None or child == around:
                block = code.blocks[number]
                cycles[number] = clock.run(code.instructions[block.start : block.end])
                at += 1
            else:
                body = list(code.loops[child].blocks)
                walk(body, child)
                walk(body, child)
                at += sum(1 for other in blocks[at:] if other in body)

    walk(list(range(len(code.blocks))), None)
    return cycles


class _Clock:
    """The time of one warp: instructions in order, stalls, scoreboards."""

    def __init__(self, card: Card, load: int) -> None:
        self.card, self.load, self.now = card, load, 0.0
        self.ready: list[list[float]] = [[] for _ in range(6)]
        self.copies = 0.0  # when the last asynchronous copy arrives

    def run(self, instructions: list[Instruction]) -> Counter[str]:
        """Returns how long a block takes, by lines."""
        passed = Counter[str]()
        for one in instructions:
            before = self.now
            for board in one.waits:
                self.now = max([self.now, *self.ready[board]])
                self.ready[board] = []
            if one.opcode.startswith("DEPBAR"):
                self._wait_for_some(one.operands)
            done = self.now + self._latency(one)
            for board in one.sets:
                self.ready[board].append(done)
            for board in one.holds:
                self.ready[board].append(self.now + 12)
            self.now = done if one.kind == "barrier" else self.now + one.stall
            passed[" < ".join(one.lines)] += self.now - before  # type: ignore[assignment]
        return passed

    def _wait_for_some(self, operands: str) -> None:
        """Waits until no more than the last few results of a scoreboard are on their way."""
        board, _, left = operands.partition(",")
        number = int("".join(filter(str.isdigit, board)) or 0)
        results = self.ready[number]
        keep = int(left.strip() or "0", 16) if left else 0
        if len(results) > keep:
            self.now = max(self.now, *results[: len(results) - keep])
            self.ready[number] = results[len(results) - keep :]

    def _latency(self, one: Instruction) -> float:
        if one.kind == "copy_async":
            self.copies = self.now + self.load
        if one.opcode.startswith("LDGDEPBAR"):
            return max(0.0, self.copies - self.now)
        if one.kind in ("load_global", "copy_async", "load_local"):
            return self.load if one.size >= 8 else self.card.near
        if one.kind.startswith("store"):
            return 12
        return self.card.latency.get(one.kind, 16)
