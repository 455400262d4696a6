"""What can be proven of a kernel without a GPU: counts of faults that cost time, from its intermediate and PTX code.

``counts`` returns, for the kernel's tiles of weights (and of their moments):

    narrow      loads of 16 bytes that are missing: its threads bring their shares of tiles by smaller ones
    converted   changes of layout within loops, each a way through shared memory
    ways        how many times longer the worst load of a matrix product's operand takes, by bank conflicts
    barriers    in one iteration of a loop, at most; without those of loops within it
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastmaf.bench.dev import bank_conflicts, intermediate, ptx

# The arguments through which kernels load weights, and addresses of weights.
WEIGHTS = ("w_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "blocks_ptr")


def counts(built: Any, arguments: list[str]) -> dict[str, int]:
    """Returns the counts for what Triton built; ``arguments`` are the names of the kernel's arguments at run time."""
    ir = intermediate.parse(built.asm["ttgir"], arguments)
    weights = intermediate.tile_loads(ir, WEIGHTS)
    loaded = ptx.loads_by_place(built.asm["ptx"])
    wanted: Counter[intermediate.Place | None] = Counter()
    for load in weights:
        wanted[load.place] += intermediate.vectors(ir, load)
    return {
        "tiles": len(weights),
        "narrow": sum(max(0, count - loaded.get(place, []).count(16)) for place, count in wanted.items()),
        "converted": len(intermediate.converted(ir, weights)),
        "ways": max(map(bank_conflicts.ways, intermediate.operand_loads(ir)), default=1),
        "barriers": max(ptx.barriers(built.asm["ptx"]), default=0),
    }
