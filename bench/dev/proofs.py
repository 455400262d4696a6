"""What can be proven of a kernel without a GPU: counts of faults that cost time, from its intermediate and PTX code.

``counts`` returns, for the kernel's tiles of weights (and of their moments):

    narrow      loads of 16 bytes that are missing, or of all that a thread has of a small tile: smaller ones bring it
    converted   changes of layout within loops, each a way through shared memory
    ways        how many times longer the worst load of a matrix product's operand takes, by bank conflicts
    barriers    in one iteration of a loop, at most; without those of loops within it
    early       accesses to memory before the wait of a kernel that starts early, other than loads of tables
"""

from __future__ import annotations

from typing import Any

from fastmaf.bench.dev import bank_conflicts, early, intermediate, machine_code, ptx

# The arguments through which kernels load weights, and addresses of weights.
WEIGHTS = ("w_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "layers_ptr")


def counts(built: Any, arguments: list[str], starts_early: bool = False) -> dict[str, int]:
    """Returns the counts for what Triton built; ``arguments`` are the names of the kernel's arguments at run time."""
    ir = intermediate.parse(built.asm["ttgir"], arguments)
    weights = intermediate.tile_loads(ir, WEIGHTS)
    return {
        "tiles": len(weights),
        "narrow": sum(_narrow(ir, weights, ptx.loads_by_place(built.asm["ptx"])).values()),
        "converted": len(intermediate.converted(ir, weights)),
        "ways": max(map(bank_conflicts.ways, intermediate.operand_loads(ir)), default=1),
        "barriers": max(ptx.barriers(built.asm["ptx"]), default=0),
        "early": _early(built, arguments) if starts_early else 0,
    }


def _early(built: Any, arguments: list[str]) -> int:
    return early.faults(built.asm["ptx"], machine_code.disassemble(built.asm["cubin"]), arguments)


def _narrow(
    ir: intermediate.IR, loads: list[intermediate.Op], found: dict[intermediate.Place | None, list[int]]
) -> dict[intermediate.Place | None, int]:
    """Returns how many loads of the width that they could have are missing, by the place in Python."""
    missing: dict[intermediate.Place | None, int] = {}
    for place in {load.place for load in loads}:
        wanted = [intermediate.vectors(ir, load) for load in loads if load.place == place]
        for width in {width for width, _ in wanted}:
            least = sum(count for wide, count in wanted if wide >= width)
            there = sum(size >= width for size in found.get(place, []))
            missing[place] = max(missing.get(place, 0), least - there)
    return missing
