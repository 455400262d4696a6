"""What a kernel that starts before those ahead of it have ended does before it waits for them (``overlap``).

It may load tables, which are made before the first launch and never change, and may ask for weights without reading
them. Any other load may find what a kernel before has not written yet; any store may destroy what it still reads.
"""

from __future__ import annotations

import re
from collections import Counter

from fastmaf.bench.dev.machine_code import WAIT, MachineCode

TABLES = ("items_ptr", "panels_ptr", "counts_ptr", "layers_ptr", "group_ptr", "chunks_ptr")
_REGISTER = re.compile(r"%\w+")


def faults(ptx: str, code: MachineCode, arguments: list[str]) -> int:
    """Returns how many accesses to memory come before the wait and must not, in PTX and in machine code; more if there
    are paths past the wait. ``arguments`` are the names of the kernel's arguments at run time.
    """
    before, _, after = ptx[ptx.index("\n{") :].partition("griddepcontrol.wait")
    if not after:
        return 1
    loads, wrong = _accesses(before, arguments)
    early = [code.instructions[i] for i in _before_wait(code)]
    # The assembler may load tables later, and less of each; it must not move other loads up.
    of_machine = Counter(one.size for one in early if one.kind in ("load_global", "copy_async"))
    moved = max((_at_least(of_machine, size) - _at_least(loads, size) for size in of_machine), default=0)
    stores = sum(one.kind == "store_global" for one in early)
    return wrong + stores + max(0, moved) + _past_the_wait(code)


def _at_least(loads: Counter[int], size: int) -> int:
    """Returns how many loads are of at least so many bytes."""
    return sum(count for other, count in loads.items() if other >= size)


def _accesses(ptx: str, arguments: list[str]) -> tuple[Counter[int], int]:
    """Returns how many loads of each size in bytes there are, and how many accesses are not loads of tables."""
    sources: dict[str, set[str]] = {}  # of registers: arguments, and those whose memory was read, with a star
    loads, wrong = Counter[int](), 0
    for line in ptx.splitlines():
        found = [one for one in _REGISTER.findall(line.split("//")[0]) if not one.startswith(("%p", "%tid", "%ctaid"))]
        if argument := re.search(r"ld\.param\S*\s+(%\w+), \[\w+_param_(\d+)\]", line):
            number = int(argument[2])
            sources[argument[1]] = {arguments[number]} if number < len(arguments) else set()
        elif re.search(r"\b(ld|st|atom|red|cp\.async)\.(?!param|shared|bulk\.prefetch)", line):
            address = re.search(r"\[\s*(%\w+)", line)
            of = sources.get(address[1], set()) if address else set()
            pointers = {one for one in of if one.endswith("_ptr") and not one.startswith("*")}
            load = re.search(r"\bld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+) ", line)
            if load:
                loads[int(load[1] or 1) * int(load[2]) // 8] += 1
            wrong += not load or not pointers or not pointers <= set(TABLES)
            sources |= {one: {f"*{name}" for name in pointers} for one in found[:-1]}
        elif found and not re.search(r"\b(setp|bra|prefetch)\b", line):
            # A guarded instruction may leave its result as it was.
            kept = sources.get(found[0], set()) if line.lstrip().startswith("@") else set()
            sources[found[0]] = kept.union(*(sources.get(one, set()) for one in found[1:]))
    return loads, wrong


def _before_wait(code: MachineCode) -> set[int]:
    """Returns the instructions that can run before the wait."""
    found, waiting, seen = set[int](), [0], set[int]()
    while waiting:
        if (number := waiting.pop()) not in seen:
            seen.add(number)
            block = code.blocks[number]
            found |= set(range(block.start, block.end))
            waiting += [] if code.waits(block) else block.next
    return found


def _past_the_wait(code: MachineCode) -> int:
    """Returns how many ends of the kernel are reached without a wait, and waits that some threads leave out or that lie
    in a loop, into which Triton might move loads from behind them.
    """
    early = [code.instructions[i] for i in _before_wait(code)]
    left_out = sum(one.opcode.startswith("EXIT") or (one.guarded and one.opcode.startswith(WAIT)) for one in early)
    inner = code.innermost()
    return left_out + sum(code.waits(block) and inner[i] is not None for i, block in enumerate(code.blocks))
