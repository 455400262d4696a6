"""Runs a plan and returns its rows."""

from __future__ import annotations

import secrets
import tempfile
import time
from typing import NamedTuple

import torch

import fastmaf
from fastmaf.bench import machine
from fastmaf.bench.cases import Plan
from fastmaf.bench.libraries import LIBRARIES
from fastmaf.bench.rows import Row, row_of
from fastmaf.bench.suite import Measured, Progress, Suite


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
        suite = Suite(plan, seed, progress, device, folder)
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


def _limits_with(threads: int | None) -> dict[str, float]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return machine.limits()
    finally:
        torch.set_num_threads(before)


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
