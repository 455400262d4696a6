"""Goes through the cases of a plan: each library in a process of its own, checked first, then in turns with fastmaf."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastmaf.bench import machine
from fastmaf.bench.cases import EPOCH_BATCH, Case, Group, Plan
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.libraries import Size
from fastmaf.bench.server import Timed
from fastmaf.bench.worker import LibraryError, Worker
from fastmaf.capsule.synthetic import draw_dataset

FASTMAF = "fastmaf"
REST = 0.02  # seconds between two turns, in which one process is suspended and the other wakes up
ENOUGH = 8.0  # seconds of a case after which three rounds suffice
BUSY = 0.1  # the share of the processors above which other processes are noted
EPOCH_SECONDS = 8.0  # of an epoch's steps after which the rest is extrapolated
# The part of the check that covers a case; log_prob covers those that train or store the weights.
CHECKED_BY = {"sample": "inverse", "sampling memory": "inverse", "train step": "train step", "epoch": "train step"}

Progress = Callable[[str, int], None]


class Measured(NamedTuple):
    """What one library took for one case."""

    group: Group
    case: Case
    library: str
    values: list[float]
    times_fastmaf: float | None = None
    first: float | None = None
    note: str = ""
    error: float | None = None


class Suite:
    """The state of a run.

    Attributes:
        measured: what the libraries took.
        left_out: what was not measured, and why.
        wrong: libraries that failed the check.
    """

    group: Group
    baseline: Worker | None  # fastmaf, as long as it works; without it the others are compared with nothing

    def __init__(self, plan: Plan, seed: int, progress: Progress, device: str, folder: str) -> None:
        self.plan, self.seed, self.progress, self.device, self.folder = plan, seed, progress, device, Path(folder)
        self.measured: list[Measured] = []
        self.left_out: list[str] = []
        self.wrong: list[str] = []
        self._done = 0

    def run(self) -> None:
        """Measures everything."""
        for case in self.plan.cases:
            if case.name == "epoch":
                self.progress("drawing images", 0)
                _draw_images(self.folder, case.batch, self.plan.pixels)
        for group in self.plan.groups():
            self.group = group
            self._run_group()

    def _run_group(self) -> None:
        group, first = self.group, len(self.measured)
        self.pooled: dict[Case, list[float]] = {}  # fastmaf's times in turns with other libraries
        self.baseline = self._start(FASTMAF)
        try:
            for name in group.libraries:
                end = self._done + len(group.cases_of(name))
                worker = self.baseline if name == FASTMAF else self._start(name)
                if worker is not None:
                    self._try(worker)
                self._finish("", end - self._done)
        finally:
            if self.baseline is not None:
                self.baseline.close()
            # fastmaf's row covers all the minutes in which the others were measured, not only the first.
            for i, row in enumerate(self.measured[first:], first):
                if row.library == FASTMAF:
                    self.measured[i] = row._replace(values=row.values + self.pooled.get(row.case, []))

    def _try(self, worker: Worker) -> None:
        """Measures a library, or notes why that is not possible."""
        usable = False
        try:
            self._measure(worker)
            usable = worker is self.baseline
        except (ImportError, LibraryError) as error:
            self.left_out.append(f"{worker.name} at {self.group.size}: {error}")
        except WrongResultError as error:
            self.wrong.append(f"{worker.name} at {self.group.size}: {error}")
        finally:
            if not usable:
                worker.close()
        if self.baseline is not None and not self.baseline.alive:
            self.baseline = None

    def _finish(self, text: str, count: int) -> None:
        self.progress(text, count)
        self._done += count

    def _start(self, name: str) -> Worker | None:
        """Starts the process of a library, or notes why that is not possible."""
        size = self.group.size
        self.progress(f"building {name} at {size}", 0)
        need, free = _needed(name, size), machine.free_bytes(self.device)
        try:
            if need > free:
                raise LibraryError(f"needs about {need / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
            return Worker(name, size, self.seed, self.group.threads, self.device)
        except (ImportError, LibraryError) as error:
            self.left_out.append(f"{name} at {size}: {error}")
            return None

    def _measure(self, worker: Worker) -> None:
        cases, results = self.group.cases_of(worker.name), {}
        for case in sorted(cases, key=lambda case: case.name != "sampling memory"):  # the peak never falls
            if case.unit == "GB":
                self._finish(f"{worker.name}: {case.label}", 1)
                peak = worker.ask("memory", case.name, case.batch)
                if peak is not None:
                    results[case] = Measured(self.group, case, worker.name, [peak / 1e9])
        self.progress(f"{worker.name}: comparing its results", 0)
        batches: dict[str, list[int]] = {}
        for case in cases:
            batches.setdefault(case.name, []).append(case.batch)
        errors: dict[str, float] = worker.ask("check", self.seed, batches)
        measure = {"build": self._build, "epoch": self._epoch}
        for case in cases:
            if case.unit != "GB":
                self._finish(f"{worker.name}: {case.label}", 1)
                results[case] = measure.get(case.name, self._in_turns)(worker, case)
        for case in cases:  # in the order of the plan
            if case in results:
                self.measured.append(results[case]._replace(error=errors[CHECKED_BY.get(case.name, "log_prob")]))

    def _in_turns(self, worker: Worker, case: Case) -> Measured:
        both = [worker] if self.baseline in (None, worker) else [self.baseline, worker]
        seconds = self.plan.seconds
        firsts = [library.ask("prepare", case.name, case.batch, seconds, self._folder_of(library)) for library in both]
        values: list[list[float]] = [[] for _ in both]
        ratios, others, note, start = [], [], "", time.monotonic()
        for done in range(self.plan.rounds):
            if done >= 3 and time.monotonic() - start > ENOUGH:
                break
            medians = []
            for library, times in zip(both, values, strict=True):
                time.sleep(REST)
                timed: Timed = library.ask("time", case.name, case.batch, seconds)
                times += timed.seconds
                medians.append(statistics.median(timed.seconds))
                others.append(timed.others)
                note = timed.note
            ratios.append(medians[-1] / medians[0])
        if (share := statistics.median(others)) > BUSY:
            note = "; ".join(filter(None, (note, f"other processes took {share:.0%} of the processors")))
        if len(both) == 2:
            self.pooled.setdefault(case, []).extend(values[0])
        ratio = None if self.baseline is None else statistics.median(ratios)
        return Measured(self.group, case, worker.name, values[-1], ratio, firsts[-1], note)

    def _folder_of(self, worker: Worker) -> str:
        folder = self.folder / worker.name
        folder.mkdir(exist_ok=True)
        return str(folder)

    def _epoch(self, worker: Worker, case: Case) -> Measured:
        arguments = (str(self.folder), EPOCH_BATCH, EPOCH_SECONDS)
        timed: Timed = worker.ask("epoch", *arguments)
        ratio = None
        if self.baseline is not None:
            other = timed if worker is self.baseline else self.baseline.ask("epoch", *arguments)
            ratio = timed.seconds[0] / other.seconds[0]
        return Measured(self.group, case, worker.name, timed.seconds, ratio, None, timed.note)

    def _build(self, worker: Worker, case: Case) -> Measured:
        first, *later = worker.build_seconds
        values, ratio = later or [first], None
        if self.baseline is not None:
            # If one was built only once, the first build of each: it uses memory that is new to the process.
            other_first, *other_later = self.baseline.build_seconds
            both = bool(later and other_later)
            other = statistics.median(other_later) if both else other_first
            ratio = (statistics.median(later) if both else first) / other
        return Measured(self.group, case, worker.name, values, ratio, first)


def _draw_images(folder: Path, count: int, pixels: int) -> None:
    """Draws up to eight synthetic capsules and copies them, as decoding copies takes the same time."""
    drawn = min(count, 8)
    draw_dataset(folder, train=drawn, good=0, defects={}, size=pixels, progress=False)
    files = sorted((folder / "train" / "good").iterdir())
    for i in range(drawn, count):
        shutil.copyfile(files[i % drawn], files[0].with_name(f"{i:03d}.png"))


def _needed(name: str, size: Size) -> float:
    """Returns about how many bytes a library takes at its peak, including its check."""
    if name.startswith(FASTMAF):
        return 36.0 * size.dense_weights  # packed with moments, and a step of the naive counterpart
    weights = 48.0 * size.dense_weights
    return weights + 32.0 * size.features**2 if name == "zuko" else weights  # zuko compares all rows of a D x D matrix
