"""When kernels that follow each other in a graph start and end, with those that start before the last one has ended.

Such a kernel's programs take the free places of the multiprocessors as soon as all of the kernel before have started,
prefetch weights, and wait. Assumed: that no more than two kernels are under way at a time; that a program which waits
goes on half the time of a launch after the last kernel has ended; that prefetching is limited by memory alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastmaf.bench.dev.cards import Card


class Stages(NamedTuple):
    """What a launch's time consists of.

    Attributes:
        early: whether it starts before the last one has ended.
        before: seconds until its programs wait for the last one.
        working: seconds from there on if memory took none.
        ends: of these, seconds before and after loops.
        memory: seconds of memory.
        streams: whether weights are asked for so early that programs wait for memory's rate alone, not for each load.
        prefetched: seconds of memory that programs ask for before they wait.
        grid: number of programs.
        warps, registers, shared: of a program; registers of all its threads, bytes of shared memory.
    """

    early: bool
    before: float
    working: float
    ends: float
    memory: float
    streams: bool
    prefetched: float
    grid: int
    warps: int
    registers: int
    shared: int


class Timeline:
    """Adds launches one after the other."""

    def __init__(self, card: Card) -> None:
        self.card = card
        # When all programs of the last kernel had started, when it ended, and when the one before it did.
        self.started = self.ended = self.ended_before = 0.0
        self.free = self._all()  # what the last kernel leaves of each multiprocessor

    def add(self, stages: Stages) -> float:
        """Returns the seconds by which a launch makes the whole longer."""
        last, launch = self.ended, self.card.launch_s
        alone, free = _placed(stages, self._all())
        if stages.early and last:
            share, _ = _placed(stages, self.free)
            placed = max(self.started + launch, self.ended_before)
            waiting = max(0.0, last + launch / 2 - placed - stages.before)  # of programs that memory can serve
            go = max(last + launch / 2, (placed if share == 1 else last) + stages.before)
            memory = stages.memory - min(stages.prefetched * share, waiting)
            placed = placed if share == 1 else last
        else:
            placed, memory = last + launch, stages.memory
            go = placed + stages.before
        self.ended = go + (max(stages.working, stages.ends + memory) if stages.streams else stages.working + memory)
        # Of several waves, the last begins when only so many programs are left.
        self.started = placed if alone == 1 else go + (self.ended - go) * (1 - alone)
        self.ended_before, self.free = last, free
        return self.ended - last

    def _all(self) -> np.ndarray:
        """Returns what each multiprocessor has: programs, warps, registers, bytes of shared memory."""
        return np.tile([32, self.card.warps, 65_536, self.card.shared], (self.card.sms, 1))


def _placed(stages: Stages, free: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the share of programs that find places, evenly spread, and what is left."""
    need = np.array([1, stages.warps, stages.registers, stages.shared + 1024])
    room = (free // need).min(1)
    each, left = np.zeros_like(room), min(stages.grid, int(room.sum()))
    share = left / stages.grid
    while left:
        taking = np.flatnonzero(each < room)[:left]
        each[taking] += 1
        left -= len(taking)
    return share, free - each[:, None] * need
