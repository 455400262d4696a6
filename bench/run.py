"""Runs a plan: each library in a process of its own, checked first, then in turns with fastmaf."""

from __future__ import annotations

import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from fastmaf.bench import machine
from fastmaf.bench.cases import EPOCH_BATCH, Case, Group, Plan
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.libraries import Size
from fastmaf.bench.rows import Measured, Row
from fastmaf.bench.worker import LibraryError, Timed, Worker
from fastmaf.capsule.synthetic import draw_dataset

FASTMAF = "fastmaf"
REST = 0.02  # seconds between two turns, in which one process is suspended and the other wakes up
ENOUGH = 8.0  # seconds of a case after which three rounds suffice
BUSY = 0.1  # the share of the processors above which other processes are noted
EPOCH_SECONDS = 8.0  # of an epoch's steps after which the rest is extrapolated
# The part of the check that covers a case; log_prob covers those that train or store the weights.
CHECKED_BY = {"sample": "inverse", "sampling memory": "inverse", "train step": "train step", "epoch": "train step"}

Progress = Callable[[str, int], None]


class Result(NamedTuple):
    """The rows of a run, the machine and its limits, what was not measured, and libraries that failed the check."""

    rows: list[Row]
    about: dict[str, str]
    left_out: list[str]
    wrong: list[str]


def run(
    plan: Plan, progress: Progress = lambda _text, _done: None, *, seed: int | None = None, device: str = "cpu"
) -> Result:
    """Runs a plan.

    ``progress`` is called with what is done next, and how many of the ``plan.total`` results were finished since. The
    seed is that of weights and inputs; None draws one.
    """
    about, start = machine.describe(device), time.monotonic()
    seed = secrets.randbelow(2**31) if seed is None else seed
    measure = machine.limits if device == "cpu" else machine.cuda_limits
    progress("measuring the limits of this machine", 0)
    limits = measure() | machine.file_limits()
    if device != "cpu":
        torch.cuda.empty_cache()  # the libraries need it
    with tempfile.TemporaryDirectory(prefix="fastmaf-bench-") as folder:
        suite = Suite(plan, seed, progress, device, folder)
        try:
            suite.run()
        except KeyboardInterrupt:
            suite.left_out.append("everything after Ctrl-C")
    progress("measuring the limits of this machine again", 0)
    # The rates of a shared machine change while a run lasts: the best one counts.
    for name, rate in measure().items():
        limits[name] = (min if name.endswith("_us") else max)(limits[name], rate)
    about |= {name: f"{rate:.4g}" for name, rate in limits.items()}
    about |= {"suite": plan.name, "seed": str(seed), "minutes": f"{(time.monotonic() - start) / 60:.1f}"}
    by_threads: dict[int | None, dict[str, float]] = {None: limits}
    default = torch.get_num_threads()
    for measured in suite.measured:
        if (threads := measured.group.threads) is not None and threads not in by_threads:
            torch.set_num_threads(threads)
            try:
                by_threads[threads] = limits | machine.limits()
            finally:
                torch.set_num_threads(default)
    rows = [measured.row(by_threads[measured.group.threads]) for measured in suite.measured]
    return Result(rows, about, suite.left_out, suite.wrong)


class Suite:
    """The state of a run: what was measured, what was left out and why, and what is wrong."""

    def __init__(self, plan: Plan, seed: int, progress: Progress, device: str, folder: str) -> None:
        self.plan, self.seed, self.progress, self.device, self.folder = plan, seed, progress, device, Path(folder)
        self.measured: list[Measured] = []
        self.left_out: list[str] = []
        self.wrong: list[str] = []
        self._done = 0

    def run(self) -> None:
        """Measures everything."""
        for case in self.plan.groups[0].cases:
            if case.name == "epoch":
                self.progress("drawing images", 0)
                _draw_images(self.folder, case.batch, self.plan.pixels)
        for group in self.plan.groups:
            self._run_group(group)

    def _run_group(self, group: Group) -> None:
        self.group, start = group, len(self.measured)
        self.pooled: dict[Case, list[float]] = {}  # fastmaf's times in turns with other libraries
        self.baseline: Worker | None = None  # fastmaf, as long as it works; without it nothing is compared
        try:
            for name in group.libraries:
                end = self._done + len(group.cases_of(name))
                self._run_library(name)
                self._finish("", end - self._done)
        finally:
            if self.baseline is not None:
                self.baseline.close()
            # fastmaf's row covers all the minutes in which the others were measured, not only the first.
            for i, result in enumerate(self.measured[start:], start):
                if result.library == FASTMAF:
                    self.measured[i] = result._replace(values=result.values + self.pooled.get(result.case, []))

    def _run_library(self, name: str) -> None:
        """Measures a library, or notes why that is not possible."""
        size = self.group.size
        with ExitStack() as stack:
            try:
                worker = self._start(name)
                stack.callback(worker.close)
                if name == FASTMAF:
                    self.baseline = worker
                self._measure(worker)
                if name == FASTMAF:
                    stack.pop_all()  # it takes turns with the others
            except (ImportError, LibraryError) as error:
                self.left_out.append(f"{name} at {size}: {error}")
            except WrongResultError as error:
                self.wrong.append(f"{name} at {size}: {error}")
        if self.baseline is not None and not self.baseline.alive:
            self.baseline = None

    def _finish(self, text: str, count: int) -> None:
        self.progress(text, count)
        self._done += count

    def _start(self, name: str) -> Worker:
        size = self.group.size
        self.progress(f"building {name} at {size}", 0)
        need, free = _needed_bytes(name, size), machine.free_bytes(self.device)
        if need > free:
            raise LibraryError(f"needs about {need / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
        return Worker(name, size, self.seed, self.group.threads, self.device)

    def _measure(self, worker: Worker) -> None:
        cases, results = self.group.cases_of(worker.name), {}
        for case in sorted(cases, key=lambda case: case.name != "sampling memory"):  # the peak never falls
            if case.unit == "GB":
                self._finish(f"{worker.name}: {case.label}", 1)
                peak = worker.ask("memory", case.name, case.batch)
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
        self.measured += [results[case]._replace(error=errors[CHECKED_BY.get(case.name, "log_prob")]) for case in cases]

    def _in_turns(self, worker: Worker, case: Case) -> Measured:
        both = [worker] if self.baseline in (None, worker) else [self.baseline, worker]
        seconds, firsts = self.plan.seconds, []
        for library in both:
            folder = self.folder / library.name
            folder.mkdir(exist_ok=True)
            firsts.append(library.ask("prepare", case.name, case.batch, seconds, str(folder)))
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

    def _epoch(self, worker: Worker, case: Case) -> Measured:
        def timed(library: Worker) -> Timed:
            return library.ask("epoch", str(self.folder), EPOCH_BATCH, EPOCH_SECONDS)

        result, ratio = timed(worker), None
        if self.baseline is not None:
            ratio = 1.0 if worker is self.baseline else result.seconds[0] / timed(self.baseline).seconds[0]
        return Measured(self.group, case, worker.name, result.seconds, ratio, None, result.note)

    def _build(self, worker: Worker, case: Case) -> Measured:
        first, *later = worker.build_seconds
        ratio = None
        if self.baseline is not None:
            # If one was built only once, the first build of each: it uses memory that is new to the process.
            runs = [library.build_seconds for library in (worker, self.baseline)]
            times = [statistics.median(run[1:] if min(map(len, runs)) > 1 else run[:1]) for run in runs]
            ratio = times[0] / times[1]
        return Measured(self.group, case, worker.name, later or [first], ratio, first)


def _draw_images(folder: Path, count: int, pixels: int) -> None:
    """Draws up to eight synthetic capsules and copies them, as decoding copies takes the same time."""
    drawn = min(count, 8)
    draw_dataset(folder, train=drawn, good=0, defects={}, size=pixels, progress=False)
    files = sorted((folder / "train" / "good").iterdir())
    for i in range(drawn, count):
        shutil.copyfile(files[i % drawn], files[0].with_name(f"{i:03d}.png"))


def _needed_bytes(name: str, size: Size) -> float:
    """Returns about how many bytes a library takes at its peak, including its check."""
    if name.startswith(FASTMAF):
        return 36.0 * size.dense_weights  # packed with moments, and a step of the naive counterpart
    weights = 48.0 * size.dense_weights
    return weights + 32.0 * size.features**2 if name == "zuko" else weights  # zuko compares all rows of a D x D matrix
