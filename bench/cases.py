"""What is measured: the cases with the bytes and operations that must move, the sides of each, and the sizes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

from fastmaf.bench.sides import SIDES, Size

Rate = Literal["read", "copy", "adam", "write file", "read file"]

EVERY = tuple(SIDES)
TRAINING = tuple(name for name in SIDES if name != "fastmaf, bfloat16")
# torch.compile compiles anew for every shape, for half a minute each: two of them show what it brings.
EAGER = tuple(name for name in SIDES if "compiled" not in name and "kept" not in name)


class Case(NamedTuple):
    """One thing that is measured.

    Attributes:
        name: as printed.
        batch: how many images or samples, those of all steps together.
        sides: which are measured.
        moved: how many times each visible weight, 4 bytes, must be read or written in a step (for memory: held).
        rate: the machine's rate at which that can happen.
        products: how many times each visible weight must be multiplied with the batch.
        steps: how often the weights are moved.
        unit: of the result.
    """

    name: str
    batch: int
    sides: tuple[str, ...]
    moved: float
    rate: Rate = "read"
    products: int = 0
    steps: int = 1
    unit: Literal["s", "GB"] = "s"

    def label(self) -> str:
        """Returns the case and its batch in words."""
        return f"{self.name} {self.batch}" if self.batch else self.name


# A build writes each weight once; copying counts what is read and what is written.
BUILD = Case("build", 0, EAGER, 2, "copy")
SCORE = [Case("log_prob", n, EVERY if n == 8 else EAGER, 1, products=1) for n in (1, 8, 64)]
SAMPLE = [Case("sample", n, EAGER if n > 1 else (*EAGER, "naive, memory kept"), 1, products=1) for n in (1, 5, 64)]
# Forward reads a weight; the way back reads and writes it and both of Adam's moments. Three products: forward, the
# gradient of the input, the gradient of the weight.
TRAIN = [
    Case("train step", n, TRAINING if n == 8 else tuple(s for s in TRAINING if s in EAGER), 7, "adam", 3)
    for n in (8, 64)
]
# Weights and two moments must be held; a sample needs the weights.
MEMORY = [
    Case("build memory", 0, EAGER, 1, unit="GB"),
    Case("training memory", 8, TRAINING, 3, unit="GB"),
    Case("sampling memory", 5, EAGER, 1, unit="GB"),
]
FILES = [Case("save", 0, EAGER, 1, "write file"), Case("load", 0, EAGER, 1, "read file")]


EPOCH_BATCH = 8


def epoch(images: int) -> Case:
    """Returns an epoch of the capsule workflow: reading and decoding ``images`` files, then training steps."""
    sides = tuple(name for name in TRAINING if name in EAGER)
    return Case("epoch", images, sides, 7, "adam", 3, steps=-(-images // EPOCH_BATCH))


class Sweep(NamedTuple):
    """A series of sizes in which one thing grows.

    Attributes:
        name: the column of the rows that grows.
        sizes: and the threads, None for all.
        sides: which are measured.
        cases: and at what.
    """

    name: str
    sizes: tuple[tuple[Size, int | None], ...]
    sides: tuple[str, ...]
    cases: tuple[Case, ...]


class Plan(NamedTuple):
    """A whole run.

    Attributes:
        name: quick or full.
        size: of the flow in the cases.
        sides: which are measured.
        cases: of ``size``.
        images: of an epoch, and their side in pixels.
        rounds: how often a case goes round its two sides, and for how many seconds each time.
        sweeps: further series.
    """

    name: str
    size: Size
    sides: tuple[str, ...]
    cases: tuple[Case, ...]
    images: tuple[int, int]
    rounds: int
    seconds: float
    sweeps: tuple[Sweep, ...]

    @property
    def parts(self) -> int:
        """How many numbers the run is to give."""
        total = sum(side in case.sides for side in self.sides for case in self.cases)
        for sweep in self.sweeps:
            total += len(sweep.sizes) * sum(side in case.sides for side in sweep.sides for case in sweep.cases)
        return total


def planned(name: str, device: str = "cpu", sides: Sequence[str] = ()) -> Plan:
    """Returns the plan ``quick`` or ``full`` with the sides that a device can have, and no others than ``sides`` beside
    fastmaf.

    Raises:
        ValueError: there is no such side.
    """
    plan = {"quick": QUICK, "full": FULL}[name]
    possible = tuple(side for side in plan.sides if SIDES[side].device in (None, device))
    if unknown := [side for side in sides if side not in possible]:
        raise ValueError(f"there is no side {unknown[0]!r} in this run; expected some of: {', '.join(possible)}")
    if sides:
        possible = tuple(side for side in possible if side in ("fastmaf", *sides))
    # A sweep of threads says nothing about a GPU, and none has more threads than there are cores.
    cores = os.cpu_count() or 1
    sweeps = tuple(
        sweep._replace(
            sides=tuple(side for side in sweep.sides if side in possible),
            sizes=tuple(point for point in sweep.sizes if (point[1] or 1) <= cores),
        )
        for sweep in plan.sweeps
        if device == "cpu" or sweep.name != "threads"
    )
    return plan._replace(sides=possible, sweeps=sweeps)


def _sizes(*sizes: Size) -> tuple[tuple[Size, int | None], ...]:
    return tuple((size, None) for size in sizes)


_SWEPT = (SCORE[1], SAMPLE[0], TRAIN[0], *MEMORY[1:])
_PAIR = ("fastmaf", "naive")
_FULL = Size(12_288, (512, 512), 7)

FULL = Plan(
    "full",
    _FULL,
    EVERY,
    (BUILD, *SCORE, *SAMPLE, *TRAIN, *MEMORY, *FILES, epoch(224)),
    (224, 1000),
    rounds=5,
    seconds=0.2,
    sweeps=(
        Sweep("features", _sizes(*(Size(d, (512, 512), 1) for d in (768, 3_072, 12_288, 49_152))), _PAIR, _SWEPT),
        Sweep("hidden_features", _sizes(*(Size(12_288, (h, h), 1) for h in (128, 512, 1_024, 4_096))), _PAIR, _SWEPT),
        Sweep("blocks", _sizes(*(Size(3_072, (512, 512), b) for b in (1, 3, 7, 20))), _PAIR, _SWEPT),
        Sweep(
            "levels", _sizes(*(_FULL._replace(levels=n) for n in (16, 64, 256, 512))), ("fastmaf",), (SCORE[1], *SAMPLE)
        ),
        Sweep("threads", tuple((_FULL, n) for n in (1, 2)), _PAIR, (SCORE[1], SAMPLE[0], TRAIN[0])),
    ),
)

QUICK = Plan(
    "quick",
    Size(3_072, (256, 256), 2),
    tuple(name for name in EVERY if not name.startswith("naive, ")),
    (BUILD, *SCORE, SAMPLE[0], TRAIN[0], *MEMORY, *FILES, epoch(24)),
    (24, 256),
    rounds=3,
    seconds=0.03,
    sweeps=(Sweep("features", _sizes(*(Size(d, (128, 128), 1) for d in (768, 3_072))), _PAIR, _SWEPT),),
)
