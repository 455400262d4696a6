"""Bank conflicts of shared memory, from the layouts of both sides of a load or store (``intermediate.Op``)."""

from __future__ import annotations

import re
from collections import defaultdict

from fastmaf.bench.dev.intermediate import Op, Tile, tiles

_ROW = 128  # bytes that shared memory serves at once: 32 banks of 4


def ways(op: Op) -> int:
    """Returns how many times longer than without bank conflicts a load from shared memory or a store into it takes.

    For tensors of two dimensions in swizzled memory, in blocked layouts or those of matrix products' operands.
    """
    found = tiles(op.types)
    (memory,) = [tile for tile in found if "shared" in tile.layout]
    (registers,) = [tile for tile in found if "shared" not in tile.layout]
    fast, vector, per_phase, phases, row = _swizzle(memory)
    places, run = _first_places(registers, fast)
    size = min(16, run * memory.item, *((vector * memory.item,) if phases > 1 else ()))
    size = max(4, 1 << size.bit_length() - 1)  # bytes of one thread's access
    threads = _ROW // size  # that are served at once
    worst = 1
    for first in range(0, len(places), threads):
        pieces: dict[int, set[int]] = defaultdict(set)
        for place in places[first : first + threads]:
            slow, column = place[1 - fast], place[fast]
            swizzled = (column // vector ^ slow // per_phase % phases) * vector + column % vector
            piece = (slow * row + swizzled) * memory.item // size
            pieces[piece % threads].add(piece)
        worst = max(worst, *map(len, pieces.values()))
    return worst


def _swizzle(memory: Tile) -> tuple[int, int, int, int, int]:
    """Returns the contiguous dimension of shared memory, its swizzle, and the length of its rows in elements."""
    if "nvmma_shared" in memory.layout:
        width = max(16, _number(memory.layout, "swizzlingByteWidth"))
        fast = 0 if "transposed = true" in memory.layout else 1
        return fast, 16 // memory.item, _ROW // width, width // 16, width // memory.item
    fast = _numbers(memory.layout, "order")[0]
    vector, per_phase, phases = (_number(memory.layout, name) for name in ("vec", "perPhase", "maxPhase"))
    return fast, vector, per_phase, phases, memory.shape[fast]


def _first_places(registers: Tile, fast: int) -> tuple[list[tuple[int, int]], int]:
    """Returns the place of the first element of each thread that takes part in a warp's access, and how many elements
    follow it along dimension ``fast``.
    """
    layout = registers.layout
    k = 1 - _number(layout, "opIdx") if "dot_op" in layout else -1  # the dimension that is summed over
    if "nvidia_mma" in layout:
        run = _number(layout, "kWidth")
        if registers.item == 2 or (fast == k and run * registers.item == 4):  # ldmatrix: 8 rows of 16 bytes
            return [(i, 0) if fast == 1 else (0, i) for i in range(8)], 16 // registers.item
        pairs = [(lane // 4, lane % 4 * run) for lane in range(32)]
        return [(i, j) if k == 1 else (j, i) for i, j in pairs], run if fast == k else 1
    each, threads, order = (_numbers(layout, name) for name in ("sizePerThread", "threadsPerWarp", "order"))
    places = []
    for lane in range(32):
        at = [0, 0]
        for dim in order:
            lane, at[dim] = lane // threads[dim], lane % threads[dim] * each[dim] % registers.shape[dim]
        if k >= 0:
            at[k] = 0  # a thread has all of it
        places.append((at[0], at[1]))
    return places, registers.shape[k] if fast == k else each[fast]


def _number(layout: str, name: str) -> int:
    return int(re.findall(rf"\b{name} = (\d+)", layout)[0])


def _numbers(layout: str, name: str) -> list[int]:
    return [int(number) for number in re.findall(rf"\b{name} = \[([\d, ]+)\]", layout)[0].split(",")]
