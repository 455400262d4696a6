"""What is measured: the cases with the bytes and operations that they need at least, their libraries, and the sizes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from fastmaf.bench.libraries import LIBRARIES, Size

Rate = Literal["read", "copy", "adam", "write file", "read file"]

ALL = tuple(LIBRARIES)
# torch.compile takes half a minute for every new shape: it is shown at two of them.
EAGER = tuple(name for name in ALL if "compiled" not in name and "kept" not in name)
TRAINABLE = tuple(name for name in ALL if "bfloat16" not in name)
EAGER_TRAINABLE = tuple(name for name in TRAINABLE if name in EAGER)


class Case(NamedTuple):
    """One measurement.

    Attributes:
        name: as printed.
        batch: number of samples, those of all steps together.
        libraries: that are measured.
        moved: how often each visible weight, 4 bytes, must be read or written in a step (for memory: be held).
        rate: the machine's rate that limits this.
        products: how often each visible weight must be multiplied with the batch.
        steps: how often the weights are moved.
        unit: of the result.
    """

    name: str
    batch: int
    libraries: tuple[str, ...]
    moved: float
    rate: Rate = "read"
    products: int = 0
    steps: int = 1
    unit: Literal["s", "GB"] = "s"

    @property
    def label(self) -> str:
        """The name with the batch."""
        return f"{self.name} {self.batch}" if self.batch else self.name

    def limit(self, weights: int, weight_bytes: int, rates: dict[str, float]) -> tuple[float, str]:
        """Returns the least that this can take on a machine, in its unit, and the bytes or operations that decide it.

        Args:
            weights: that are visible through the masks.
            weight_bytes: of each.
            rates: as ``machine.limits`` and ``machine.file_limits`` measure them.
        """
        moved = self.steps * self.moved * weight_bytes * weights
        if self.unit == "GB":
            return moved / 1e9, f"{moved / 1e9:.3g} GB"
        move = moved / rates[f"{self.rate.replace(' ', '_')}_gb_per_s"] / 1e9
        operations = 2.0 * self.batch * self.products * weights
        multiply = operations / rates["sgemm_gflop_per_s"] / 1e9
        if multiply > move:
            return multiply, f"{operations / 1e9:.3g} GFLOP"
        return max(move, rates["launch_us"] / 1e6), f"{moved / 1e6:,.3g} MB" if moved < 1e9 else f"{moved / 1e9:.3g} GB"


def log_prob(n: int, libraries: tuple[str, ...] = EAGER) -> Case:
    return Case("log_prob", n, libraries, 1, products=1)


def sample(n: int, libraries: tuple[str, ...] = EAGER) -> Case:
    return Case("sample", n, libraries, 1, products=1)


def train_step(n: int, libraries: tuple[str, ...] = EAGER_TRAINABLE) -> Case:
    # Forward reads a weight; backward reads and writes it and both moments of Adam. Three products: forward, gradient
    # of the input, gradient of the weight.
    return Case("train step", n, libraries, 7, "adam", 3)


def epoch(images: int) -> Case:
    """Returns an epoch of the capsule workflow: reading and decoding ``images`` files, then training steps."""
    return Case("epoch", images, EAGER_TRAINABLE, 7, "adam", 3, steps=-(-images // EPOCH_BATCH))


EPOCH_BATCH = 8
BUILD = Case("build", 0, EAGER, 2, "copy")  # writes each weight once; a copy's rate counts bytes read and written
LOG_PROB = log_prob(8, ALL)
SAMPLE = sample(1, (*EAGER, "naive, memory kept"))
TRAIN_STEP = train_step(8, TRAINABLE)
MEMORY = (
    Case("build memory", 0, EAGER, 1, unit="GB"),
    Case("training memory", 8, TRAINABLE, 3, unit="GB"),  # weights and two moments
    Case("sampling memory", 5, EAGER, 1, unit="GB"),
)
FILES = (Case("save", 0, EAGER, 1, "write file"), Case("load", 0, EAGER, 1, "read file"))


class Sweep(NamedTuple):
    """A series of sizes.

    Attributes:
        name: the column of the rows that varies, or "small".
        sizes: and the number of threads, None for the default.
        libraries: that are measured.
        cases: that are measured at every size.
    """

    name: str
    sizes: tuple[tuple[Size, int | None], ...]
    libraries: tuple[str, ...]
    cases: tuple[Case, ...]


class Group(NamedTuple):
    """Cases of one size, for which each library has one process."""

    sweep: str
    size: Size
    threads: int | None
    libraries: tuple[str, ...]
    cases: tuple[Case, ...]

    def cases_of(self, library: str) -> list[Case]:
        return [case for case in self.cases if library in case.libraries]


class Plan(NamedTuple):
    """A whole run.

    Attributes:
        name: quick or full.
        size: of the flow in the cases.
        libraries: that are measured.
        cases: of ``size``.
        pixels: side length of the images of an epoch.
        rounds: how often a case alternates between its two libraries.
        seconds: of each turn.
        sweeps: further series.
    """

    name: str
    size: Size
    libraries: tuple[str, ...]
    cases: tuple[Case, ...]
    pixels: int
    rounds: int
    seconds: float
    sweeps: tuple[Sweep, ...]

    def groups(self) -> Iterator[Group]:
        """Yields what is measured, in order."""
        yield Group("", self.size, None, self.libraries, self.cases)
        for sweep in self.sweeps:
            for size, threads in sweep.sizes:
                yield Group(sweep.name, size, threads, sweep.libraries, sweep.cases)

    @property
    def total(self) -> int:
        """The number of results."""
        return sum(len(group.cases_of(name)) for group in self.groups() for name in group.libraries)


def planned(name: str, device: str = "cpu", libraries: Sequence[str] = ()) -> Plan:
    """Returns the plan ``quick`` or ``full`` for a device, of fastmaf and ``libraries``, or of all libraries.

    Raises:
        ValueError: there is no such library.
    """
    plan = {"quick": QUICK, "full": FULL}[name]
    chosen = tuple(library for library in plan.libraries if LIBRARIES[library].device in (None, device))
    if unknown := [library for library in libraries if library not in chosen]:
        raise ValueError(f"there is no library {unknown[0]!r} in this run; expected some of: {', '.join(chosen)}")
    if libraries:
        chosen = tuple(library for library in chosen if library in ("fastmaf", *libraries))
    cores = os.cpu_count() or 1
    sweeps = [
        sweep._replace(
            libraries=tuple(library for library in sweep.libraries if library in chosen),
            sizes=tuple((size, threads) for size, threads in sweep.sizes if (threads or 1) <= cores),
        )
        for sweep in plan.sweeps
        if device == "cpu" or sweep.name != "threads"
    ]
    return plan._replace(libraries=chosen, sweeps=tuple(sweeps))


def _sizes(*sizes: Size) -> tuple[tuple[Size, int | None], ...]:
    return tuple((size, None) for size in sizes)


_SWEPT = (log_prob(8), sample(1), train_step(8), *MEMORY[1:])
_PAIR = ("fastmaf", "naive")
_FULL = Size(12_288, (512, 512), 7)  # of the published run


def _small(*libraries: str) -> tuple[Sweep, Sweep]:
    """Returns cases in which Python takes most of the time."""
    return (
        Sweep("small", _sizes(Size(64, (64, 64), 3)), libraries, (log_prob(1),)),
        Sweep("small", _sizes(Size(6, (64, 64), 5)), libraries, (train_step(256),)),
    )


FULL = Plan(
    "full",
    _FULL,
    ALL,
    (
        *(BUILD, log_prob(1), LOG_PROB, log_prob(64), SAMPLE, sample(5), sample(64), TRAIN_STEP, train_step(64)),
        *(*MEMORY, *FILES, epoch(224)),
    ),
    pixels=1000,
    rounds=5,
    seconds=0.2,
    sweeps=(
        *_small("fastmaf", "fastmaf (torch)", "naive", "dense", "nflows", "zuko"),
        Sweep("features", _sizes(*(Size(d, (512, 512), 1) for d in (768, 3_072, 12_288, 49_152))), _PAIR, _SWEPT),
        Sweep("hidden_features", _sizes(*(Size(12_288, (h, h), 1) for h in (128, 512, 1_024, 4_096))), _PAIR, _SWEPT),
        Sweep("blocks", _sizes(*(Size(3_072, (512, 512), b) for b in (1, 3, 7, 20))), _PAIR, _SWEPT),
        Sweep(
            "levels",
            _sizes(*(_FULL._replace(levels=n) for n in (16, 64, 256, 512))),
            ("fastmaf",),
            (log_prob(8), sample(1), sample(5), sample(64)),
        ),
        Sweep("threads", ((_FULL, 1), (_FULL, 2)), _PAIR, (log_prob(8), sample(1), train_step(8))),
    ),
)

QUICK = Plan(
    "quick",
    Size(3_072, (256, 256), 2),
    tuple(name for name in ALL if not name.startswith("naive, ")),
    (BUILD, log_prob(1), LOG_PROB, log_prob(64), SAMPLE, TRAIN_STEP, *MEMORY, *FILES, epoch(24)),
    pixels=256,
    rounds=3,
    seconds=0.03,
    sweeps=(
        *_small("fastmaf", "naive"),
        Sweep("features", _sizes(*(Size(d, (128, 128), 1) for d in (768, 3_072))), _PAIR, _SWEPT),
    ),
)
