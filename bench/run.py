"""Runs a plan: each library in a process of its own, checked first, then timed in turns with fastmaf."""

from __future__ import annotations

import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import fastmaf
from fastmaf.bench import machine
from fastmaf.bench.cases import EPOCH_BATCH, Case, Group, Plan
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.libraries import LIBRARIES, Size
from fastmaf.bench.rows import Row, row_of
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
    """The result of a run.

    Attributes:
        rows: one per case and library.
        about: the machine, its versions and limits.
        left_out: what was not measured, and why.
        wrong: libraries that failed the check, which have no rows.
    """

    rows: list[Row]
    about: dict[str, str]
    left_out: list[str]
    wrong: list[str]


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


def run(
    plan: Plan, progress: Progress = lambda _text, _done: None, *, seed: int | None = None, device: str = "cpu"
) -> Result:
    """Runs a plan.

    Args:
        plan: the cases and sweeps.
        progress: is called with what is done next, and how many of the ``plan.total`` results were finished since.
        seed: of weights and inputs; None draws one.
        device: cpu or cuda.
    """
    about, start = machine.describe(device), time.monotonic()
    seed = secrets.randbelow(2**31) if seed is None else seed
    measure = machine.limits if device == "cpu" else machine.cuda_limits
    progress("measuring the limits of this machine", 0)
    limits = measure() | machine.file_limits()
    if device != "cpu":
        torch.cuda.empty_cache()  # the libraries need it
    with tempfile.TemporaryDirectory(prefix="fastmaf-bench-") as folder:
        suite = _Suite(plan, seed, progress, device, folder)
        try:
            suite.run()
        except KeyboardInterrupt:
            suite.left_out.append("everything after Ctrl-C")
    progress("measuring the limits of this machine again", 0)
    # The rates of a shared machine change while a run lasts: the best one counts.
    for name, value in measure().items():
        limits[name] = (min if name.endswith("_us") else max)(limits[name], value)
    about |= {name: f"{value:.4g}" for name, value in limits.items()}
    about |= {"suite": plan.name, "seed": str(seed), "minutes": f"{(time.monotonic() - start) / 60:.1f}"}
    by_threads: dict[int | None, dict[str, float]] = {None: limits}
    for threads in {measured.group.threads for measured in suite.measured} - {None}:
        by_threads[threads] = limits | _limits_with(threads)
    rows = [_row(measured, by_threads[measured.group.threads]) for measured in suite.measured]
    return Result(rows, about, suite.left_out, suite.wrong)


class _Suite:
    """The state of a run."""

    def __init__(self, plan: Plan, seed: int, progress: Progress, device: str, folder: str) -> None:
        self.plan, self.seed, self.progress, self.device, self.folder = plan, seed, progress, device, folder
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
            self._run_group(group)

    def _run_group(self, group: Group) -> None:
        fast, first = self._start(FASTMAF, group), len(self.measured)
        pooled: dict[Case, list[float]] = {}  # fastmaf's times in turns with other libraries
        try:
            for name in group.libraries:
                end = self._done + len(group.cases_of(name))
                worker = fast if name == FASTMAF else self._start(name, group)
                try:
                    if worker is not None:
                        self._measure(worker, fast, group, pooled)
                except (ImportError, LibraryError) as error:
                    self.left_out.append(f"{name} at {group.size}: {error}")
                    # Without fastmaf the others are measured, and compared with nothing.
                    fast = fast if fast is not None and fast.alive and fast is not worker else None
                except WrongResultError as error:
                    self.wrong.append(f"{name} at {group.size}: {error}")
                    fast = None if fast is worker else fast
                finally:
                    if worker is not None and worker is not fast:
                        worker.close()
                self._finish("", end - self._done)
        finally:
            if fast is not None:
                fast.close()
            # fastmaf's row covers all the minutes in which the others were measured, not only the first.
            for i, row in enumerate(self.measured[first:], first):
                if row.library == FASTMAF:
                    self.measured[i] = row._replace(values=row.values + pooled.get(row.case, []))

    def _finish(self, text: str, count: int) -> None:
        self.progress(text, count)
        self._done += count

    def _start(self, name: str, group: Group) -> Worker | None:
        """Starts the process of a library, or notes why that is not possible."""
        self.progress(f"building {name} at {group.size}", 0)
        need, free = _needed(name, group.size), machine.free_bytes(self.device)
        try:
            if need > free:
                raise LibraryError(f"needs about {need / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
            return Worker(name, group.size, self.seed, group.threads, self.device)
        except (ImportError, LibraryError) as error:
            self.left_out.append(f"{name} at {group.size}: {error}")
            return None

    def _measure(self, worker: Worker, fast: Worker | None, group: Group, pooled: dict[Case, list[float]]) -> None:
        cases, found = group.cases_of(worker.name), {}
        for case in sorted(cases, key=lambda case: case.name != "sampling memory"):  # the peak never falls
            if case.unit == "GB":
                self._finish(f"{worker.name}: {case.label}", 1)
                peak = worker.ask("memory", case.name, case.batch)
                if peak is not None:
                    found[case] = Measured(group, case, worker.name, [peak / 1e9])
        self.progress(f"{worker.name}: comparing its results", 0)
        batches: dict[str, list[int]] = {}
        for case in cases:
            batches.setdefault(case.name, []).append(case.batch)
        errors: dict[str, float] = worker.ask("check", self.seed, batches)
        for case in cases:
            if case.unit != "GB":
                self._finish(f"{worker.name}: {case.label}", 1)
                if case.name == "build":
                    found[case] = _build(worker, fast, group, case)
                elif case.name == "epoch":
                    found[case] = self._epoch(worker, fast, group, case)
                else:
                    found[case] = self._in_turns(worker, fast, group, case, pooled)
        for case in cases:  # in the order of the plan
            if case in found:
                self.measured.append(found[case]._replace(error=errors[CHECKED_BY.get(case.name, "log_prob")]))

    def _in_turns(
        self, worker: Worker, fast: Worker | None, group: Group, case: Case, pooled: dict[Case, list[float]]
    ) -> Measured:
        both = [worker] if fast is None or fast is worker else [fast, worker]
        seconds = self.plan.seconds
        firsts = [own.ask("prepare", case.name, case.batch, seconds, self._folder_of(own)) for own in both]
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
        if statistics.median(others) > BUSY:
            busy = f"other processes took {statistics.median(others):.0%} of the processors"
            note = f"{note}; {busy}" if note else busy
        if len(both) == 2:
            pooled.setdefault(case, []).extend(values[0])
        ratio = None if fast is None else statistics.median(ratios)
        return Measured(group, case, worker.name, values[-1], ratio, firsts[-1], note)

    def _folder_of(self, worker: Worker) -> str:
        folder = Path(self.folder, worker.name)
        folder.mkdir(exist_ok=True)
        return str(folder)

    def _epoch(self, worker: Worker, fast: Worker | None, group: Group, case: Case) -> Measured:
        timed: Timed = worker.ask("epoch", self.folder, EPOCH_BATCH, EPOCH_SECONDS)
        ratio = None
        if fast is not None:
            other = timed if fast is worker else fast.ask("epoch", self.folder, EPOCH_BATCH, EPOCH_SECONDS)
            ratio = timed.seconds[0] / other.seconds[0]
        return Measured(group, case, worker.name, timed.seconds, ratio, None, timed.note)


def _build(worker: Worker, fast: Worker | None, group: Group, case: Case) -> Measured:
    first, *later = worker.build_seconds
    values = later or [first]
    ratio = None
    if fast is not None:
        # If one was built only once, the first build of each: it uses memory that is new to the process.
        both = bool(later) and len(fast.build_seconds) > 1
        beside = fast.build_seconds[1:] if both else fast.build_seconds[:1]
        ratio = statistics.median(values if both else [first]) / statistics.median(beside)
    return Measured(group, case, worker.name, values, ratio, first)


def _limits_with(threads: int | None) -> dict[str, float]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return machine.limits()
    finally:
        torch.set_num_threads(before)


def _draw_images(folder: str, count: int, pixels: int) -> None:
    """Draws up to eight synthetic capsules and copies them, as decoding copies takes the same time."""
    drawn = min(count, 8)
    draw_dataset(folder, train=drawn, good=0, defects={}, size=pixels, progress=False)
    files = sorted(Path(folder, "train", "good").iterdir())
    for i in range(drawn, count):
        shutil.copyfile(files[i % drawn], files[0].with_name(f"{i:03d}.png"))


def _needed(name: str, size: Size) -> float:
    """Returns about how many bytes a library takes at its peak, including its check."""
    if name.startswith(FASTMAF):
        return 36.0 * size.dense_weights  # packed with moments, and a step of the naive counterpart
    weights = 48.0 * size.dense_weights
    return weights + 32.0 * size.features**2 if name == "zuko" else weights  # zuko compares all rows of a D x D matrix


def _row(measured: Measured, limits: dict[str, float]) -> Row:
    (sweep, size, threads, *_), case = measured.group, measured.case
    flow = fastmaf.MAF(size.features, size.blocks, size.hidden, order="natural", levels=size.levels, device="meta")
    limit, must_move = case.limit(flow.visible_weights, LIBRARIES[measured.library].weight_bytes, limits)
    names = {
        "sweep": sweep,
        "case": case.name,
        "batch": str(case.batch or ""),
        "library": measured.library,
        "features": str(size.features),
        "hidden_features": "x".join(map(str, size.hidden)),
        "blocks": str(size.blocks),
        "levels": "" if size.levels is None else str(size.levels),
        "threads": str(threads or torch.get_num_threads()),
        "unit": case.unit,
        "must_move": must_move,
        "note": measured.note,
    }
    return row_of(names, measured.values, measured.times_fastmaf, limit, measured.first, measured.error)
