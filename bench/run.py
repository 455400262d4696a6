"""Runs a plan: every side in a process of its own, checked first, then timed in turn with fastmaf."""

from __future__ import annotations

import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import fastmaf
from fastmaf.bench import machine
from fastmaf.bench.cases import EPOCH_BATCH, Case, Plan, Sweep
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.rows import Row, row_of
from fastmaf.bench.sides import SIDES, Size
from fastmaf.bench.worker import SideError, Timed, Worker
from fastmaf.capsule.synthetic import draw_dataset

FAST = "fastmaf"
REST = 0.02  # seconds between two processes, in which the one is suspended and the other wakes up
ENOUGH = 8.0  # seconds of a case after which three rounds will do
BUSY = 0.1  # the share of the processors from which other processes are worth a note
EPOCH = 8.0  # seconds of an epoch's steps after which the rest is extrapolated


class Measured(NamedTuple):
    """What one side gave for one case."""

    sweep: str
    case: Case
    side: str
    size: Size
    threads: int | None
    values: Sequence[float]
    times_fast: float | None = None  # how many times fastmaf's: the median of what the rounds gave
    first: float | None = None
    note: str = ""
    error: float | None = None


class Result(NamedTuple):
    """What a run gave.

    Attributes:
        rows: one per case and side.
        about: the machine, its versions and limits.
        left_out: sentences about what was not measured, and why.
        wrong: sentences about sides whose results were wrong, of which there are no rows.
    """

    rows: list[Row]
    about: dict[str, str]
    left_out: list[str]
    wrong: list[str]


Say = Callable[[str, int], None]


def run(plan: Plan, say: Say = lambda _text, _parts: None, *, seed: int | None = None, device: str = "cpu") -> Result:
    """Runs a plan.

    Args:
        plan: the cases and sweeps.
        say: is told what is about to be done, and how many of the ``plan.parts`` parts of the run have been done since.
        seed: of weights and inputs; None draws one.
        device: cpu or cuda.
    """
    about = machine.describe(device)
    measure = machine.limits if device == "cpu" else machine.cuda_limits
    seed = secrets.randbelow(2**31) if seed is None else seed
    began = time.monotonic()
    say("measuring the limits of this machine", 0)
    limits = measure() | machine.file_limits()
    if device != "cpu":
        torch.cuda.empty_cache()  # what the limits were measured with: the sides need it
    suite = _Suite(plan, seed, say, device)
    try:
        with tempfile.TemporaryDirectory(prefix="fastmaf-bench-") as folder:
            suite.cases(folder)
        for sweep in plan.sweeps:
            for size, threads in sweep.sizes:
                suite.point(sweep, size, threads)
    except KeyboardInterrupt:
        suite.left_out.append("whatever came after Ctrl-C")
    say("measuring the limits of this machine again", 0)
    # What nothing can beat is the best that was seen: the rates of a shared machine wander while a run lasts.
    for name, value in measure().items():
        limits[name] = min(limits[name], value) if name.endswith("_us") else max(limits[name], value)
    about |= {name: f"{value:.4g}" for name, value in limits.items()}
    about |= {"suite": plan.name, "seed": str(seed), "minutes": f"{(time.monotonic() - began) / 60:.1f}"}
    by_threads: dict[int | None, dict[str, float]] = {None: limits}
    for threads in {measured.threads for measured in suite.measured} - {None}:
        by_threads[threads] = limits | _limits_with(threads)
    rows = [_row(measured, by_threads[measured.threads]) for measured in suite.measured]
    return Result(rows, about, suite.left_out, suite.wrong)


class _Suite:
    """The state of a run."""

    def __init__(self, plan: Plan, seed: int, say: Say, device: str) -> None:
        self.plan, self.seed, self.say, self.device = plan, seed, say, device
        self.measured: list[Measured] = []
        self.left_out: list[str] = []
        self.wrong: list[str] = []
        self._told = 0  # of the plan's parts
        self._beside_others: dict[Case, list[float]] = {}  # fastmaf's times, taken in turn with those of other sides

    def cases(self, folder: str) -> None:
        """Measures all cases, fastmaf's process staying while those of the others come and go."""
        images, pixels = self.plan.images
        if any(case.name == "epoch" for case in self.plan.cases):
            self.say("drawing images", 0)
            _draw_images(folder, images, pixels)
        self._beside(self.plan.sides, "", self.plan.size, None, self.plan.cases, folder)

    def point(self, sweep: Sweep, size: Size, threads: int | None) -> None:
        """Measures one size of a sweep."""
        self._beside(sweep.sides, sweep.name, size, threads, sweep.cases, None)

    def _beside(
        self,
        sides: Sequence[str],
        sweep: str,
        size: Size,
        threads: int | None,
        cases: Sequence[Case],
        folder: str | None,
    ) -> None:
        fast, first = self._start(FAST, size, threads), len(self.measured)
        self._beside_others = {}
        try:
            for name in sides:
                own = [case for case in cases if name in case.sides]
                end = self._told + len(own)
                worker = fast if name == FAST else self._start(name, size, threads)
                usable = fast
                try:
                    if worker is not None:
                        self._measure(worker, fast, sweep, size, threads, own, folder)
                except (ImportError, SideError) as error:
                    self.left_out.append(f"{name} at {_words(size)}: {error}")
                    usable = fast if fast is not None and fast is not worker and fast.alive else None
                except WrongResultError as error:
                    self.wrong.append(f"{name} at {_words(size)}: {error}")
                    usable = None if fast is worker else fast
                finally:
                    if worker is not None and worker is not fast:
                        worker.close()
                if fast is not None and usable is None:
                    fast.close()
                fast = usable  # where it has failed, the others are measured without it, and compared with nothing
                self._tell("", end - self._told)
        finally:
            if fast is not None:
                fast.close()
            # fastmaf's own row is of all the minutes in which others were measured, not of the first one alone.
            for i, row in enumerate(self.measured[first:], first):
                if row.side == FAST:
                    self.measured[i] = row._replace(values=[*row.values, *self._beside_others.get(row.case, [])])

    def _tell(self, text: str, parts: int) -> None:
        self.say(text, parts)
        self._told += parts

    def _start(self, name: str, size: Size, threads: int | None) -> Worker | None:
        """Starts a side's process; where that cannot be, that is noted."""
        self.say(f"building {name} at {_words(size)}", 0)
        need, free = _needed(name, size), machine.free_bytes(self.device)
        try:
            if need > free:
                raise SideError(f"needs about {need / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
            return Worker(name, size, self.seed, threads, self.device)
        except (ImportError, SideError) as error:
            self.left_out.append(f"{name} at {_words(size)}: {error}")
            return None

    def _measure(
        self,
        worker: Worker,
        fast: Worker | None,
        sweep: str,
        size: Size,
        threads: int | None,
        cases: Sequence[Case],
        folder: str | None,
    ) -> None:
        found: dict[Case, Measured] = {}
        for case in sorted(cases, key=lambda case: case.name != "sampling memory"):  # the peak never falls
            if case.unit == "GB":
                self._tell(f"{worker.name}: {case.label()}", 1)
                peak = worker.ask("memory", case.name, case.batch)
                if peak is not None:
                    found[case] = Measured(sweep, case, worker.name, size, threads, [peak / 1e9])
        self.say(f"{worker.name}: comparing its results", 0)
        batches: dict[str, list[int]] = {}
        for case in cases:
            batches.setdefault(case.name, []).append(case.batch)
        errors: dict[str, float] = worker.ask("check", self.seed, batches)
        # Which part of the check vouches for a case; the density does for whatever trains or stores the weights.
        parts = {"sample": "inverse", "sampling memory": "inverse", "train step": "train step", "epoch": "train step"}
        for case in cases:
            if case.unit != "GB":
                self._tell(f"{worker.name}: {case.label()}", 1)
                if case.name == "build":
                    first, *times = worker.build_seconds
                    own = Measured(sweep, case, worker.name, size, threads, times or [first], first=first)
                    if fast is not None:
                        # The first of each where one was built but once: the memory of a first one is new to it.
                        warm = bool(times) and len(fast.build_seconds) > 1
                        beside = fast.build_seconds[1:] if warm else fast.build_seconds[:1]
                        own = own._replace(times_fast=statistics.median(times or [first]) / statistics.median(beside))
                elif case.name == "epoch":
                    own = self._epochs(worker, fast, case, str(folder))
                else:
                    own = self._in_turn(worker, fast, case)
                found[case] = own._replace(sweep=sweep, size=size, threads=threads)
        # In the order of the plan, whatever the order in which they had to be measured.
        for case in cases:
            if case in found:
                error = errors[parts.get(case.name, "log_prob")]
                self.measured.append(found[case]._replace(error=error))

    def _in_turn(self, worker: Worker, fast: Worker | None, case: Case) -> Measured:
        both = [worker] if fast is None or fast is worker else [fast, worker]
        firsts = [side.ask("prepare", case.name, case.batch, self.plan.seconds) for side in both]
        values: list[list[float]] = [[] for _ in both]
        ratios: list[float] = []
        others: list[float] = []
        note = ""
        began = time.monotonic()
        for done in range(self.plan.rounds):
            if done >= 3 and time.monotonic() - began > ENOUGH:
                break
            medians: list[float] = []
            for i, side in enumerate(both):
                time.sleep(REST)
                timed: Timed = side.ask("time", case.name, case.batch, self.plan.seconds)
                values[i] += timed.seconds
                medians.append(statistics.median(timed.seconds))
                others.append(timed.others)
                note = timed.note
            ratios.append(medians[-1] / medians[0])
        if statistics.median(others) > BUSY:
            words = f"other processes took {statistics.median(others):.0%} of the processors"
            note = f"{note}; {words}" if note else words
        if len(both) == 2:
            self._beside_others.setdefault(case, []).extend(values[0])
        ratio = None if fast is None else statistics.median(ratios)
        return Measured("", case, worker.name, worker.size, None, values[-1], ratio, firsts[-1], note)

    def _epochs(self, worker: Worker, fast: Worker | None, case: Case, folder: str) -> Measured:
        side = round((worker.size.features / 3) ** 0.5)
        own: Timed = worker.ask("epoch", folder, side, EPOCH_BATCH, EPOCH)
        ratio = None
        if fast is not None:
            other = own if fast is worker else fast.ask("epoch", folder, side, EPOCH_BATCH, EPOCH)
            ratio = own.seconds[0] / other.seconds[0]
        return Measured("", case, worker.name, worker.size, None, own.seconds, ratio, None, own.note)


def _limits_with(threads: int | None) -> dict[str, float]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return machine.limits()
    finally:
        torch.set_num_threads(before)


def _draw_images(folder: str, count: int, pixels: int) -> None:
    """Draws a few synthetic capsules, and copies them until there are ``count``: decoding takes the same."""
    drawn = min(count, 8)
    draw_dataset(folder, train=drawn, good=0, defects={}, size=pixels, progress=False)
    files = sorted(Path(folder, "train", "good").iterdir())
    for i in range(drawn, count):
        shutil.copyfile(files[i % drawn], files[0].with_name(f"{i:03d}.png"))


def _needed(name: str, size: Size) -> float:
    """Returns about how many bytes a side takes at its peak, its check included."""
    if name.startswith(FAST):
        return 12.0 * size.dense_weights + 24 * size.dense_weights  # packed with moments; then its naive twin's step
    weights = 36.0 * size.dense_weights + 12 * size.dense_weights
    return weights + 32.0 * size.features**2 if name == "zuko" else weights  # zuko compares all rows of a D x D matrix


def _words(size: Size) -> str:
    return f"D = {size.features:,}, hidden {size.hidden}, {size.blocks} block{'s' if size.blocks > 1 else ''}"


def _row(measured: Measured, limits: dict[str, float]) -> Row:
    size, case = measured.size, measured.case
    flow = fastmaf.MAF(size.features, size.blocks, size.hidden, order="natural", levels=size.levels, device="meta")
    limit, moved = limit_of(case, flow.visible_weights, SIDES[measured.side].weight_bytes, limits)
    return row_of(
        {
            "sweep": measured.sweep,
            "case": case.name,
            "batch": str(case.batch or ""),
            "side": measured.side,
            "features": str(size.features),
            "hidden_features": "x".join(map(str, size.hidden)),
            "blocks": str(size.blocks),
            "levels": "" if size.levels is None else str(size.levels),
            "threads": str(measured.threads or torch.get_num_threads()),
            "unit": case.unit,
            "must_move": moved,
            "note": measured.note,
        },
        measured.values,
        measured.times_fast,
        limit,
        measured.first,
        measured.error,
    )


def limit_of(case: Case, weights: int, weight_bytes: int, limits: dict[str, float]) -> tuple[float, str]:
    """Returns the least that a case can take on a machine, in its unit, and what must move, in words.

    Args:
        weights: that the masks let through.
        weight_bytes: of each.
        limits: as ``machine.limits`` and ``machine.file_limits`` measure them.
    """
    moved = case.steps * case.moved * weight_bytes * weights
    if case.unit == "GB":
        return moved / 1e9, f"{moved / 1e9:.3g} GB"
    move = moved / limits[f"{case.rate.replace(' ', '_')}_gb_per_s"] / 1e9
    operations = 2.0 * case.batch * case.products * weights
    multiply = operations / limits["sgemm_gflop_per_s"] / 1e9
    if multiply > move:
        return multiply, f"{operations / 1e9:.3g} GFLOP"
    return max(move, limits["launch_us"] / 1e6), f"{moved / 1e6:,.3g} MB" if moved < 1e9 else f"{moved / 1e9:.3g} GB"
