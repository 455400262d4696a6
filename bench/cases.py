"""What is measured: the cases with the bytes and operations that they need at least, their libraries, and the sizes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from fastmaf.bench.libraries import LIBRARIES, PEERS, Size

Rate = Literal["read", "copy", "adam", "write file", "read file"]

ALL = tuple(LIBRARIES)
# torch.compile takes half a minute for every new shape: it is shown at two of them.
EAGER = tuple(name for name in ALL if "compiled" not in name and "kept" not in name)
TRAINABLE = tuple(name for name in ALL if "bfloat16" not in name)
EAGER_TRAINABLE = tuple(name for name in TRAINABLE if name in EAGER)


class Case(NamedTuple):
    """One measurement."""

    name: str
    batch: int  # number of samples, those of all steps together
    libraries: tuple[str, ...]
    moved: float  # how often each visible weight must be read or written in a step (for memory: be held)
    rate: Rate = "read"  # of the machine, which limits this
    products: int = 0  # how often each visible weight must be multiplied with the batch
    steps: int = 1
    unit: Literal["s", "GB"] = "s"

    @property
    def label(self) -> str:
        return f"{self.name} {self.batch}" if self.batch else self.name

    def limit(self, weights: int, weight_bytes: int, rates: dict[str, float]) -> tuple[float, str]:
        """Returns the least that this can take, in its unit, and the bytes or operations that decide it.

        ``weights`` is the number of those that are visible through the masks, so that neither padding nor masked
        weights count, for all libraries alike. ``rates`` are those of the machine.
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

    def fits_in_cache(self, weights: int, weight_bytes: int, rates: dict[str, float]) -> str:
        """Returns a note if the bytes that decide the limit may stay in the cache between two calls, else ""."""
        limit, must_move = self.limit(weights, weight_bytes, rates)
        held = (3 if self.rate == "adam" else 1) * weight_bytes * weights / 1e6  # weights and two moments
        decided = self.unit == "s" and self.rate in ("read", "copy", "adam") and must_move.endswith("B")
        if not decided or limit * 1e6 <= rates["launch_us"] or held > rates["cache_mb"]:
            return ""
        return f"{held:,.3g} MB fit in the cache of {rates['cache_mb']:,.0f} MB"


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


class Group(NamedTuple):
    """Cases of one size, for which each library has one process."""

    sweep: str  # the column of the rows that varies in a series of groups, or "small"; "" in the first group
    size: Size
    threads: int | None  # None for the default
    libraries: tuple[str, ...]
    cases: tuple[Case, ...]

    def cases_of(self, library: str) -> list[Case]:
        return [case for case in self.cases if library in case.libraries]


class Plan(NamedTuple):
    """A whole run."""

    name: str
    groups: tuple[Group, ...]  # the first has all libraries
    pixels: int  # side length of the images of an epoch
    rounds: int  # how often a case alternates between its two libraries
    seconds: float  # of each turn

    @property
    def total(self) -> int:
        return sum(len(group.cases_of(name)) for group in self.groups for name in group.libraries)


def planned(name: str, device: str = "cpu", libraries: Sequence[str] = ()) -> Plan:
    """Returns the plan ``quick`` or ``full`` for a device, of fastmaf and ``libraries``, or of all libraries.

    Raises:
        ValueError: there is no such library.
    """
    plan = {"quick": QUICK, "full": FULL}[name]
    possible = [library for library in plan.groups[0].libraries if LIBRARIES[library].device in (None, device)]
    if unknown := [library for library in libraries if library not in possible]:
        expected = ", ".join(map(repr, possible))
        raise ValueError(f"there is no library {unknown[0]!r} in this run; expected some of: {expected}")
    chosen = {"fastmaf", *(libraries or possible)}
    most_threads = (os.cpu_count() or 1) if device == "cpu" else 0
    groups = [
        group._replace(libraries=tuple(name for name in group.libraries if name in chosen))
        for group in plan.groups
        if (group.threads or 0) <= most_threads
    ]
    return plan._replace(groups=tuple(groups))


def _sweep(name: str, sizes: Iterable[Size], libraries: tuple[str, ...], *cases: Case) -> list[Group]:
    return [Group(name, size, None, libraries, cases) for size in sizes]


def _small(*libraries: str) -> list[Group]:
    """Returns cases in which Python takes most of the time: the sizes of tutorials and of tabular data."""
    cases = [case(batch) for case in (log_prob, train_step, sample) for batch in (1, 256)]
    sizes = (Size(2, (64, 64), 3), Size(6, (64, 64), 5), Size(64, (64, 64), 5))
    return [Group("small", size, None, libraries, tuple(cases)) for size in sizes]


_TIMES = (log_prob(8), sample(1), train_step(8))
_SWEPT = (*_TIMES, *MEMORY[1:])
_PAIR = ("fastmaf", "naive")
_FULL = Size(12_288, (512, 512), 7)  # of the published run
_FULL_CASES = (
    *(BUILD, log_prob(1), LOG_PROB, log_prob(64), log_prob(1_000)),
    *(SAMPLE, sample(5), sample(64), TRAIN_STEP, train_step(64)),
    *(*MEMORY, *FILES, epoch(224)),
)
_LEVELS = [_FULL._replace(levels=n) for n in (16, 64, 256, 512)]
_QUICK_CASES = (BUILD, log_prob(1), LOG_PROB, log_prob(64), SAMPLE, TRAIN_STEP, *MEMORY, *FILES, epoch(24))
_QUICK_LIBRARIES = tuple(name for name in ALL if not name.startswith("naive, "))

FULL = Plan(
    "full",
    (
        Group("", _FULL, None, ALL, _FULL_CASES),
        *_small("fastmaf", "fastmaf (torch)", "naive", "dense", *PEERS),
        *_sweep("features", (Size(d, (512, 512), 1) for d in (768, 3_072, 12_288, 49_152)), _PAIR, *_SWEPT),
        *_sweep("hidden_features", (Size(12_288, (h, h), 1) for h in (128, 512, 1_024, 4_096)), _PAIR, *_SWEPT),
        *_sweep("blocks", (Size(3_072, (512, 512), b) for b in (1, 3, 7, 20)), _PAIR, *_SWEPT),
        *_sweep("levels", _LEVELS, ("fastmaf",), log_prob(8), sample(1), sample(5), sample(64)),
        *(Group("threads", _FULL, threads, _PAIR, _TIMES) for threads in (1, 2)),
    ),
    pixels=1000,
    rounds=5,
    seconds=0.2,
)

QUICK = Plan(
    "quick",
    (
        Group("", Size(3_072, (256, 256), 2), None, _QUICK_LIBRARIES, _QUICK_CASES),
        *_small(*_PAIR),
        *_sweep("features", (Size(d, (128, 128), 1) for d in (768, 3_072)), _PAIR, *_SWEPT),
    ),
    pixels=256,
    rounds=3,
    seconds=0.03,
)
