"""Reads PTX: what its instructions load from global memory, and the barriers of its loops."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from fastmaf.bench.dev.intermediate import Place


def loads_by_place(ptx: str) -> dict[Place | None, list[int]]:
    """Returns the bytes that each instruction loads from global memory, by the place in Python that it comes from."""
    found: dict[Place | None, list[int]] = defaultdict(list)
    for code, place in _located(ptx):
        if load := re.search(r"\bld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+) ", code):
            found[place].append(int(load[1] or 1) * int(load[2]) // 8)
        elif copy := re.search(r"\bcp\.async\.c\w\.\S+ \[.*?\], \[.*?\], (\w+)", code):
            found[place].append(int(copy[1], 0))
    return dict(found)


def _located(ptx: str) -> Iterator[tuple[str, Place | None]]:
    files = {number: file for number, file in re.findall(r'\.file\s+(\d+) "(.+?)"', ptx)}
    place: Place | None = None
    passed = 0  # locations within inline assembly: all but the first count its lines, which Python does not have
    for code in ptx.splitlines():
        if "inline asm" in code:
            passed = 1 if "begin" in code else 0
        elif found := re.match(r"\s*\.loc\s+(\d+) (\d+) (\d+)", code):
            if passed < 2:
                place = (files[found[1]], int(found[2]), int(found[3]))
            passed *= 2
        else:
            yield code, place


def barriers(ptx: str) -> list[int]:
    """Returns how many barriers an iteration of each loop has, without those of loops within it."""
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    at: list[int] = []
    for number, code in enumerate(ptx.splitlines()):
        if label := re.match(r"(\$\w+):", code):
            labels[label[1]] = number
        elif (jump := re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", code)) and jump[1] in labels:
            loops.append((labels[jump[1]], number))
        elif re.search(r"\bbar(?:rier)?\.sync\b", code):
            at.append(number)
    around = [[(end - start, start) for start, end in loops if start < place < end] for place in at]
    inner = [min(found) for found in around if found]
    return [inner.count((end - start, start)) for start, end in loops]
