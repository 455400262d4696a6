"""A run: every row in the order of the plan with sane numbers, from real processes; sides that are missing, wrong,
that raise, die or hang are named and the rest goes on; and no process is left behind.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from fastmaf.bench import machine, worker
from fastmaf.bench import run as running
from fastmaf.bench.cases import BUILD, MEMORY, SAMPLE, SCORE, TRAIN, Plan, Sweep
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.rows import COLUMNS, Row
from fastmaf.bench.run import Result, run
from fastmaf.bench.sides import Size
from fastmaf.bench.worker import SideError, Worker
from tests.bench.plans import (
    FILE_LIMITS,
    LIMITS,
    TINY,
    VARIABLE,
    every_case,
    known_limits,
    made_sides,
    one_thread,
    plan_of,
    visible_weights,
    with_sides,
)

ROOT = Path(__file__).parents[2]
BAD = ("absent", "wrong", "dying", "raising", "hanging")


class Done(NamedTuple):
    """A run in real processes, what it said, and the processes that it started."""

    plan: Plan
    result: Result
    said: list[tuple[str, int]]
    started: dict[str, int]


class Noted(Worker):
    """Notes its process, and has little patience with a side that hangs once it is asked for densities."""

    started: dict[str, int] = {}

    def __init__(self, name: str, *arguments: Any, **options: Any) -> None:
        super().__init__(name, *arguments, **options)
        self.started[f"{name} at {self.size}"] = self._process.pid or 0

    def ask(self, request: str, *arguments: Any) -> Any:
        if self.name == "hanging" and request == "check":
            self.timeout = 0.3
        return super().ask(request, *arguments)


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def done(threads: None) -> Iterator[Done]:
    """A run of two good sides and of one of each bad kind, and a sweep with one thread."""
    sides = ("fastmaf", "naive", *BAD)
    sweep = Sweep(
        "threads",
        ((Size(12, (8, 8), 1), 1),),
        ("fastmaf",),
        (SCORE[1],),
    )
    # The bad sides, which come to their end anyhow, are not asked for everything.
    some = (BUILD, SCORE[1], SAMPLE[0], TRAIN[0], *MEMORY)
    cases = tuple(with_sides(case, BAD) if case in some else case for case in every_case())
    plan = plan_of(sides, (), (sweep,), seconds=1e-4)._replace(cases=cases)
    said: list[tuple[str, int]] = []
    with made_sides() as patch:
        known_limits(patch)
        patch.setenv("OMP_NUM_THREADS", "1")  # for the processes, as one_thread() is for this one
        patch.setattr(running, "Worker", Noted)
        patch.setattr(Noted, "started", {})
        result = run(plan, lambda text, parts: said.append((text, parts)), seed=3)
        started = dict(Noted.started)
    yield Done(plan, result, said, started)


def rows_of(done: Done, sweep: str = "") -> list[Row]:
    return [row for row in done.result.rows if row["sweep"] == sweep]


def test_every_row_of_the_good_sides_is_there_in_the_order_of_the_plan(done: Done) -> None:
    expected = [(case.name, str(case.batch or ""), side) for side in ("fastmaf", "naive") for case in done.plan.cases]
    assert [(row["case"], row["batch"], row["side"]) for row in rows_of(done)] == expected
    assert [(row["case"], row["side"]) for row in rows_of(done, "threads")] == [("log_prob", "fastmaf")]


def test_numbers_are_sane(done: Done) -> None:
    for row in done.result.rows:
        assert tuple(row) == COLUMNS
        low, median, high = (float(row[column]) for column in ("p20", "median", "p80"))
        assert 0 < low <= median <= high < 100, row
        assert int(row["repeats"]) >= 1
        in_turn = row["unit"] == "s" and row["case"] not in ("build", "epoch")
        assert bool(row["first"]) == (in_turn or row["case"] == "build"), row
        if in_turn:
            assert int(row["repeats"]) >= done.plan.rounds
            assert float(row["first"]) > 0


def test_rows_say_what_was_measured(done: Done) -> None:
    for row in rows_of(done):
        size = (row["features"], row["hidden_features"], row["blocks"], row["levels"])
        assert size == ("48", "16x16", "2", "")
        assert row["threads"] == "1"
    for row in rows_of(done, "threads"):
        assert (row["features"], row["hidden_features"], row["blocks"], row["threads"]) == ("12", "8x8", "1", "1")


def test_fastmaf_is_once_as_fast_as_itself(done: Done) -> None:
    for row in done.result.rows:
        if row["unit"] == "GB":
            assert not row["times_fastmaf"]
        elif row["side"] == "fastmaf":
            assert float(row["times_fastmaf"]) == 1
        else:
            assert float(row["times_fastmaf"]) > 0


def test_memory_is_in_gigabytes(done: Done) -> None:
    memory = [row for row in done.result.rows if "memory" in row["case"]]
    assert len(memory) == 6 and {row["unit"] for row in memory} == {"GB"}
    assert all(1e-5 < float(row["median"]) < 1 for row in memory), "the weights alone are 10 kB"
    by_case = {(row["side"], row["case"]): float(row["median"]) for row in memory}
    for side in ("fastmaf", "naive"):
        assert by_case[side, "training memory"] >= by_case[side, "sampling memory"], "the peak never falls"


def test_the_memory_of_a_tiny_flow_is_not_that_of_imports(done: Done) -> None:
    """The weights are 10 kB. What torch imports upon the first step or the first op of ours is 150 MB."""
    found = {(row["side"], row["case"]): float(row["median"]) for row in rows_of(done) if row["unit"] == "GB"}
    assert max(found.values()) < 0.08, found


def test_every_row_has_the_error_of_its_check(done: Done) -> None:
    for row in done.result.rows:
        error = float(row["error"])
        assert 0 <= error < 1e-2, row
        if row["case"] not in ("train step", "epoch"):
            assert error < 1e-4
    of = {(row["case"], row["side"]): row["error"] for row in rows_of(done)}
    assert of["log_prob", "naive"] == of["save", "naive"] == of["training memory", "naive"]
    assert of["sample", "naive"] == of["sampling memory", "naive"]
    assert of["train step", "naive"] == of["epoch", "naive"]


def test_limits_are_those_of_the_bytes(done: Done) -> None:
    weights = 4 * visible_weights(TINY)
    expected = {
        "build": 2 * weights / 20e9,
        "sample": weights / 30e9,
        "save": weights / 1e9,
        "load": weights / 2e9,
        "build memory": weights / 1e9,
        "training memory": 3 * weights / 1e9,
        "sampling memory": weights / 1e9,
    }
    for row in rows_of(done):
        limit, least = float(row["limit"]), 2e-6 if row["unit"] == "s" else 0.0
        if row["case"] in expected:
            assert limit == pytest.approx(max(expected[row["case"]], least), rel=1e-3), row
        assert limit >= least * 0.999
        assert float(row["fraction_of_limit"]) == pytest.approx(limit / float(row["median"]), rel=1e-3)
        assert row["must_move"].endswith((" MB", " GB", " GFLOP"))


def test_the_limits_are_the_best_of_two_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([LIMITS, {name: 2 * value for name, value in LIMITS.items()}])
    monkeypatch.setattr(machine, "limits", lambda: dict(next(measured)))
    monkeypatch.setattr(machine, "file_limits", lambda: dict(FILE_LIMITS))
    about = run(plan_of((), ()), seed=1).about
    assert {name: float(about[name]) for name in LIMITS} == {
        name: value if name == "launch_us" else 2 * value for name, value in LIMITS.items()
    }
    assert {name: float(about[name]) for name in FILE_LIMITS} == FILE_LIMITS


def test_a_run_says_on_what_it_was_measured(done: Done) -> None:
    about = done.result.about
    assert about["seed"] == "3" and about["suite"] == "tiny"
    assert {"date", "commit", "processor", "fastmaf", "torch", "python", "backend", "minutes"} <= set(about)
    assert {name: float(about[name]) for name in LIMITS} == LIMITS
    assert {name: float(about[name]) for name in FILE_LIMITS} == FILE_LIMITS


def test_samples_of_the_naive_side_are_extrapolated_in_the_open(done: Done) -> None:
    row = next(row for row in rows_of(done) if (row["case"], row["side"]) == ("sample", "naive"))
    told = re.fullmatch(r"extrapolated: (\d+) of 96 passes", row["note"])
    assert told is not None, row["note"]
    assert 4 <= int(told[1]) <= 48, "passes of one block, of which there are two"
    assert not any("extrapolated" in row["note"] for row in rows_of(done) if row["side"] == "fastmaf")


def test_an_epoch_decodes_its_images(done: Done) -> None:
    for row in rows_of(done):
        if row["case"] == "epoch":
            told = re.match(r"decoding ([\d.]+) s", row["note"])
            assert told is not None and float(row["median"]) >= float(told[1]) - 0.005


def test_a_side_whose_library_is_missing_is_named(done: Done) -> None:
    told = left_out(done, "absent")
    assert "absent is not installed" in told and "pip install 'fastmaf[bench]'" in told


def test_a_side_with_wrong_results_is_named_and_has_no_row(done: Done) -> None:
    assert len(done.result.wrong) == 1
    assert done.result.wrong[0].startswith("wrong at D = 48, hidden (16, 16), 2 blocks: log_prob is off by 1")


def test_a_side_that_dies_is_named_with_its_exit_status(done: Done) -> None:
    assert "ended with exit status 3" in left_out(done, "dying")


def test_a_side_that_raises_is_named_with_its_error(done: Done) -> None:
    told = left_out(done, "raising")
    assert "ArithmeticError: no samples today" in told and "plans.py" in told


def test_a_side_that_hangs_is_given_up(done: Done) -> None:
    assert "gave no answer within" in left_out(done, "hanging")


def test_what_comes_of_a_call_is_told_from_what_it_gave() -> None:
    def fail(error: BaseException) -> Callable[[], Any]:
        def call() -> Any:
            raise error

        return call

    assert worker._answer(lambda: 7) == ("done", 7)
    assert worker._answer(fail(ImportError("no numpy"))) == ("missing", "no numpy")
    assert worker._answer(fail(ModuleNotFoundError("no numpy"))) == ("missing", "no numpy")
    assert worker._answer(fail(WrongResultError("off"))) == ("wrong", "off")
    kind, told = worker._answer(fail(MemoryError("9 GB")))
    assert kind == "failed" and re.fullmatch(r"MemoryError: 9 GB \(test_run\.py:\d+\)", told)
    assert worker._answer(fail(AssertionError("odd")))[0] == "failed", "only the check says that results are wrong"
    with pytest.raises(KeyboardInterrupt):
        worker._answer(fail(KeyboardInterrupt()))


def test_bad_sides_are_named_once_and_have_no_row(done: Done) -> None:
    told = [sentence.partition(" at ")[0] for sentence in (*done.result.left_out, *done.result.wrong)]
    assert sorted(told) == sorted(BAD)
    assert {row["side"] for row in done.result.rows} == {"fastmaf", "naive"}


def left_out(done: Done, name: str) -> str:
    found = [sentence for sentence in done.result.left_out if sentence.startswith(f"{name} at D = 48")]
    assert len(found) == 1, done.result.left_out
    return found[0]


def test_progress_reaches_its_end(done: Done) -> None:
    assert 0 < sum(parts for _, parts in done.said) <= done.plan.parts
    assert sum(parts for _, parts in done.said) == done.plan.parts, "what bad sides leave out is done with, too"
    assert any(text.startswith("naive: sample") for text, _ in done.said)


def test_no_process_is_left_behind(done: Done) -> None:
    assert len(done.started) == 7, "all but the absent one, and one of the sweep"
    multiprocessing.active_children()  # takes leave of those that have ended
    assert [name for name, pid in done.started.items() if runs(pid)] == []
    children = psutil.Process().children(recursive=True)
    left = [child.cmdline() for child in children if child.status() != psutil.STATUS_ZOMBIE]
    assert [line for line in left if any("spawn_main" in word for word in line)] == []


def runs(pid: int) -> bool:
    try:
        found: bool = psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    return found


def test_a_worker_is_suspended_between_requests_and_gone_after_them() -> None:
    with Worker("naive", Size(12, (8, 8), 1), 0) as own:
        assert len(own.build_seconds) == 3 and min(own.build_seconds) > 0
        own.ask("check", 1)
        process = psutil.Process(own._process.pid)
        assert becomes(lambda: process.status() == psutil.STATUS_STOPPED)
        assert own.ask("memory", "sampling memory", 2) >= 0, "it goes on when it is asked"
        assert own.alive
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(SideError, match="naive"):
            own.ask("check", 1)
        assert not own.alive
    assert not runs(process.pid)


def test_a_side_that_cannot_be_built_leaves_no_process() -> None:
    before = {child.pid for child in psutil.Process().children()}
    told = rf"unbuildable: ValueError: no such size, {VARIABLE} = unbuildable \(plans\.py:\d+\)"
    with made_sides(), pytest.raises(SideError, match=told):
        Worker("unbuildable", TINY, 0)
    assert VARIABLE not in os.environ, "the variables of a side are its process's alone"
    new = [child for child in psutil.Process().children() if child.pid not in before]
    assert [child for child in new if runs(child.pid) and "resource_tracker" not in " ".join(child.cmdline())] == []


def becomes(condition: Callable[[], bool]) -> bool:
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.01)
    return False


KILLED = """
import os, sys
from fastmaf.bench.sides import Size
from fastmaf.bench.worker import Worker
if __name__ == "__main__":
    worker = Worker("naive", Size(12, (8, 8), 1), 0)
    worker.ask("memory", "sampling memory", 2)
    print(worker._process.pid, flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a suspended process that it is alone")
def test_a_suspended_worker_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    told = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    pid = int(told.stdout)
    try:
        assert becomes(lambda: not runs(pid))
    finally:
        if runs(pid):
            os.kill(pid, signal.SIGKILL)
