"""Where the 32 threads of a warp access memory: bank conflicts in shared memory, sectors of global memory.

Addresses are integer functions of a thread's number and of numbers that all threads share. What they share moves all
of them alike, so it counts as zero; where a thread's part cannot be found, an access counts as one without conflicts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from fastmaf.bench.dev.disassembly import Instruction
from fastmaf.bench.dev.machine_code import MachineCode

_LANES = np.arange(32, dtype=np.int64)
_WORD = 0xFFFFFFFF
# A number of each thread; None where it is unknown and differs between threads.
Value: TypeAlias = "np.ndarray | None"


class Lanes:
    """The numbers of a warp's threads.

    Args:
        code: of the kernel.
    """

    def __init__(self, code: MachineCode) -> None:
        self._instructions, self._blocks = code.instructions, code.blocks
        self._before: list[list[int]] = [[] for _ in code.blocks]
        for number, block in enumerate(code.blocks):
            for after in block.next:
                self._before[after].append(number)
        self._definitions: dict[str, list[int]] = defaultdict(list)
        for number, one in enumerate(self._instructions):
            if one.operands and not one.kind.startswith("store") and not one.guarded:
                for name in _results(one):
                    self._definitions[name].append(number)
        self._known: dict[tuple[str, int], Value] = {}

    def addresses(self, number: int) -> Value:
        """Returns where the threads access memory by an instruction, apart from what they share."""
        match = re.search(r"\[(.*?)\]", re.sub(r"desc\[\w+\]", "", self._instructions[number].operands))
        if match is None:
            return None
        total: Value = np.zeros(32, np.int64)
        for term in match[1].split("+"):
            total = _both(total, self._value(term.strip().split(".")[0], number), lambda a, b: a + b)
        return total

    def _value(self, operand: str, at: int) -> Value:
        """Returns an operand of the instruction ``at``."""
        operand = operand.replace(".reuse", "").strip()
        negative, inverted = operand.startswith("-"), operand.startswith("~")
        operand = operand.lstrip("-~|").rstrip("|")
        name, _, part = operand.partition(".")
        if re.fullmatch(r"-?0x[0-9a-f]+|\d+", name):
            value: Value = np.full(32, int(name, 16 if "x" in name else 10), np.int64)
        elif re.fullmatch(r"R\d+", name):
            value = self._register(name, at)
        else:
            value = np.zeros(32, np.int64)  # constants, uniform registers, RZ
        if value is not None and part.startswith("H1"):
            value = value >> 16 & 0xFFFF
        if value is not None and negative:
            value = -value
        return None if value is None else ~value & _WORD if inverted else value

    def _place(self, name: str, at: int) -> int | None:
        """Returns the instruction that last wrote a register before another one."""
        inside = next((i for i, block in enumerate(self._blocks) if block.start <= at < block.end), None)
        waiting, seen = [] if inside is None else [inside], set[int]()
        end = at
        while waiting:
            number = waiting.pop()
            block = self._blocks[number]
            places = [place for place in self._definitions.get(name, []) if block.start <= place < min(end, block.end)]
            if places:
                return places[-1]
            end = len(self._instructions)
            seen.add(number)
            # The nearest block before this one first; those of loops, which come later, last.
            waiting += sorted((i for i in self._before[number] if i not in seen), key=lambda i: (i < number, i))
        return None

    def _register(self, name: str, at: int) -> Value:
        place = self._place(name, at)
        if place is None:
            return np.zeros(32, np.int64)
        if (name, place) not in self._known:
            self._known[name, place] = np.zeros(32, np.int64)  # of a loop's variable: where the loop starts
            self._known[name, place] = self._result(place, name)
        return self._known[name, place]

    def _result(self, number: int, name: str) -> Value:
        one = self._instructions[number]
        parts = [part.strip() for part in re.sub(r"\{|\}", "", one.operands).split(",")]
        if "SR_TID.X" in one.operands:
            return _LANES
        if one.opcode == "S2R" or "SR_" in one.operands:
            return np.zeros(32, np.int64)
        predicates = [part for part in parts[1:] if re.fullmatch(r"!?U?P[T0-9]", part)]
        values = [self._value(part, number) for part in parts[1:] if part not in predicates]
        if parts[0].removesuffix(".CC") != name:  # the upper half of a pair
            return None if any(_varies(value) for value in values) else np.zeros(32, np.int64)
        found = _evaluate(one.opcode, parts, values)
        if found is not None:
            return found if isinstance(found, np.ndarray) else np.zeros(32, np.int64)
        return None if any(_varies(value) for value in values) else np.zeros(32, np.int64)


def _results(one: Instruction) -> list[str]:
    name = one.operands.split(",")[0].strip().removesuffix(".CC")
    if not re.fullmatch(r"R\d+", name):
        return []
    count = max(1, one.size // 4) if one.size else 2 if ".WIDE" in one.opcode or one.opcode == "CS2R" else 1
    return [f"R{int(name[1:]) + i}" for i in range(count)]


def _varies(value: Value) -> bool:
    return value is None or bool((value != value[0]).any())


def _both(a: Value, b: Value, f: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Value:
    return None if a is None or b is None else f(a, b)


def _evaluate(opcode: str, parts: list[str], values: list[Value]) -> Value:
    """Returns an integer instruction's result, or None if it is not one of these or has unknown operands."""
    name, *words = opcode.split(".")
    if any(value is None for value in values):
        return None
    v = [value for value in values if value is not None]
    if name in ("MOV", "MOV32I", "UMOV") or (name == "IMAD" and "MOV" in words):
        return v[-1]
    if name in ("IADD3", "IADD", "IADD32I", "VIADD"):
        return sum(v[1:], v[0]) & _WORD
    if name in ("IMAD", "XMAD") and len(v) >= 3 and not {"HI", "CHI", "MRG", "PSL"} & set(words):
        return v[0] * v[1] + v[2] & _WORD
    if name in ("LEA", "ISCADD") and "HI" not in words and len(v) >= 3:
        return (v[0] << v[2]) + v[1] & _WORD
    if opcode == "LEA.HI" and len(v) == 4:
        return ((v[2] << 32 | v[0] & _WORD) << v[3] >> 32) + v[1] & _WORD
    if name in ("SHL", "SHF") and (name == "SHL" or "L" in words) and "HI" not in words:
        return v[0] << v[1] & _WORD
    if name == "SHR":
        return v[0] >> v[1]
    if name == "SHF" and "R" in words and "HI" in words and len(v) == 3:
        return v[2] >> v[1]
    if name == "SHF" and "R" in words and len(v) == 3:
        return v[0] >> v[1]
    if name == "SGXT" and "U32" in words:
        return v[0] & (1 << v[1]) - 1
    if name == "SGXT":
        top = 1 << v[1] - 1
        return ((v[0] & (top << 1) - 1) ^ top) - top & _WORD
    if name == "BFE":
        return v[0] >> (v[1] & 0xFF) & (1 << (v[1] >> 8 & 0xFF)) - 1
    if name in ("LOP", "LOP32I"):
        operation = next((word for word in words if word in ("AND", "OR", "XOR")), None)
        if operation is None:
            return v[-1] if "PASS_B" in words else None
        return v[0] & v[1] if operation == "AND" else v[0] | v[1] if operation == "OR" else v[0] ^ v[1]
    if name == "LOP3" and len(v) >= 4:
        a, b, c, table = v[0] & _WORD, v[1] & _WORD, v[2] & _WORD, int(v[3][0])
        total = np.zeros(32, np.int64)
        for i in range(8):
            if table >> i & 1:
                total |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return total & _WORD
    if name == "SEL" and len(v) >= 2:
        return v[0]
    return None


def shared_cycles(one: Instruction, addresses: Value) -> float:
    """Returns the passes that an access to shared memory takes: 128 bytes each, one word of every bank."""
    matrices = "M88" in one.opcode or "MT88" in one.opcode
    size = 16 if matrices else one.size
    if addresses is None:
        return max(1.0, 32 * one.size / 128)
    threads = 32 if not matrices else 8 * max(1, one.size // 4)  # those that give the rows of the matrices
    group = min(threads, max(8, 128 // size))
    passes = 0
    for start in range(0, threads, group):
        words = addresses[start : start + group, None] // 4 + np.arange(max(1, size // 4))
        unique = np.unique(words)
        passes += int(np.bincount(unique % 32).max())
    return float(passes)


def sectors(one: Instruction, addresses: Value) -> int:
    """Returns how many sectors of 32 bytes an access to global memory touches."""
    if addresses is None:
        return max(1, 32 * one.size // 32)
    return len(np.unique(np.concatenate([addresses // 32, (addresses + one.size - 1) // 32])))
