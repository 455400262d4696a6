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
import torch

from fastmaf.bench import cases, machine, worker
from fastmaf.bench import run as running
from fastmaf.bench.cases import BUILD, FILES, MEMORY, SAMPLE, SCORE, TRAIN, Case, Plan, Sweep, epoch, planned
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.rows import COLUMNS, Row
from fastmaf.bench.run import Result, run
from fastmaf.bench.sides import SIDES, Size, side_class
from fastmaf.bench.worker import Server, SideError, Timed, Worker
from fastmaf.reference import NaiveMADE
from tests.bench.plans import (
    FILE_LIMITS,
    LIMITS,
    TINY,
    VARIABLE,
    entries,
    every_case,
    known_limits,
    made_sides,
    one_thread,
    plan_of,
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


def visible_weights(size: Size) -> int:
    """Counts what the masks let through, by comparing degrees."""
    from fastmaf.degrees import hidden_degrees, input_degrees

    hidden = hidden_degrees("spread", size.features, size.hidden)
    widths = (size.features, *size.hidden, 2 * size.features)
    weights = [torch.zeros(out, into) for into, out in zip(widths, widths[1:], strict=False)]
    block = NaiveMADE(input_degrees(size.features), hidden, weights, [torch.zeros(len(w)) for w in weights])
    return size.blocks * sum(int(block.get_buffer(f"mask_{k}").sum()) for k in range(len(weights)))


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


# What a process does, without the process.


class Ticking:
    """A clock on which every call takes a second."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def __call__(self, call: Callable[[], object]) -> float:
        self.calls.append(call)
        call()
        return 1.0


def server_of(name: str, size: Size = TINY) -> Any:
    server: Any = Server(name, size, 0, None, "cpu")
    server._clock = Ticking()
    return server


def test_extrapolated_times_are_multiplied_with_all_passes() -> None:
    server, size = server_of("naive"), TINY
    asked: list[tuple[int, int]] = []
    passes = server.side.passes
    server.side.passes = lambda z, count: (asked.append((len(z), count)), passes(z, count))[1]
    # Four passes took a second; all 96 would take 24, more than ten times one second; so 1 / 0.25 = 4 are timed.
    first = server.prepare("sample", 5, 1.0)
    timed = server.time("sample", 5, 3.0)
    assert first == 1.0
    assert timed == Timed([24.0, 24.0, 24.0], "extrapolated: 4 of 96 passes")
    assert asked[-3:] == [(5, 4)] * 3
    # For 2.3 seconds ten passes would do; all would take more than 23.
    server.prepare("sample", 5, 2.3)
    assert server.time("sample", 5, 0.5) == Timed([pytest.approx(96 / 10)], "extrapolated: 10 of 96 passes")
    assert asked[-1] == (5, 10)
    # Where all of them take less than ten times the seconds, whole samples are drawn.
    server.prepare("sample", 5, 2.5)
    drawn: list[int] = []
    server.side.sample = drawn.append
    server.prepare("sample", 5, 2.5)
    assert server.time("sample", 5, 0.5) == Timed([1.0], "")
    assert drawn == [5, 5], "one to warm up and one that is timed"
    assert size.features * size.blocks == 96


def test_no_more_passes_are_timed_than_a_block_has() -> None:
    server = server_of("naive", Size(12, (8, 8), 40))
    server.prepare("sample", 1, 10.0)  # 480 passes of a quarter of a second; 40 would take ten seconds
    assert server.time("sample", 1, 0.5) == Timed([pytest.approx(40.0)], "extrapolated: 12 of 480 passes")


def test_a_case_is_repeated_for_its_seconds_and_at_least_once() -> None:
    server = server_of("naive")
    for case, batch in (("log_prob", 8), ("train step", 8), ("save", 0), ("load", 0)):
        assert server.prepare(case, batch, 0.1) == 1.0
        assert server.time(case, batch, 0.1).seconds == [1.0]
        assert server.time(case, batch, 3.0).seconds == [1.0] * 3


def test_a_train_step_starts_with_a_new_optimizer() -> None:
    server = server_of("naive")
    made: list[int] = []
    new_optimizer = server.side.new_optimizer
    server.side.new_optimizer = lambda: (made.append(1), new_optimizer())[1]
    server.prepare("train step", 8, 0.1)
    assert made == [1]


@pytest.mark.parametrize("name", ["fastmaf", "naive"])
def test_weights_that_do_not_come_back_are_refused(name: str) -> None:
    server = server_of(name)
    load = server.side.load
    other = side_class(name)(TINY, 99)

    def load_others(path: Path) -> None:
        other.save(path)
        load(path)

    server.side.load = load_others
    with pytest.raises(WrongResultError, match="what was loaded"):
        server.prepare("load", 0, 0.1)


def test_a_load_that_does_nothing_is_refused() -> None:
    server = server_of("naive")
    server.side.load = lambda path: None
    with pytest.raises(WrongResultError, match="what was loaded"):
        server.prepare("load", 0, 0.1)


def test_an_epoch_takes_the_steps_of_all_images_and_extrapolates_in_the_open(tmp_path: Path) -> None:
    running._draw_images(str(tmp_path), 19, 32)
    server = server_of("naive")
    steps: list[int] = []
    train_step = server.side.train_step
    server.side.train_step = lambda x: (steps.append(len(x)), train_step(x))[1]
    timed = server.epoch(str(tmp_path), 4, 8, 100.0)
    assert sorted(steps[1:]) == [3, 8, 8], "19 images, after one step to warm up"
    decode = float(re.fullmatch(r"decoding ([\d.]+) s", timed.note)[1])  # type: ignore[index]
    assert timed.seconds[0] == pytest.approx(decode + 3.0, abs=0.01) or timed.seconds[0] == pytest.approx(1.0 + 3.0)
    timed = server.epoch(str(tmp_path), 4, 8, 1.5)
    assert timed.note.endswith(", extrapolated: 2 of 3 steps")
    assert timed.seconds[0] == pytest.approx(float(timed.note.split()[1]) + 3.0, abs=0.01) or timed.seconds == [4.0]


def test_the_images_of_an_epoch_are_as_many_as_asked(tmp_path: Path) -> None:
    for count in (3, 8, 11):
        folder = tmp_path / str(count)
        running._draw_images(str(folder), count, 32)
        assert len(list((folder / "train" / "good").iterdir())) == count


def test_a_wrong_side_is_refused_by_its_process() -> None:
    server = server_of("naive")
    server.side.log_prob = lambda x: torch.zeros(len(x))
    with pytest.raises(WrongResultError, match="log_prob"):
        server.check(1)


# The order of things, with sides that only pretend.

ERRORS = {"log_prob": 1e-7, "inverse": 2e-6, "train step": 3e-4}
Event = tuple[Any, ...]


class Pretended:
    """Stands in for a worker: answers at once, notes what it is asked, and fails where it is told to."""

    events: list[Event]
    fails: dict[tuple[str, str], Exception]
    open: set[int]

    def __init__(self, name: str, size: Size, seed: int, threads: int | None, device: str) -> None:
        self.name, self.size, self.dead = name, size, False
        self.build_seconds = [2.5, 2.0, 2.0] if name == "fastmaf" else [7.0, 6.0, 6.0]
        self._fail("start")
        self.events.append((name, "start"))
        self.open.add(id(self))

    def _fail(self, request: str) -> None:
        error = self.fails.get((self.name, request))
        if self.dead or error is not None:
            self.dead = self.dead or "ended" in str(error)
            raise error or SideError(f"{self.name} has ended")

    def ask(self, request: str, *arguments: Any) -> Any:
        self.events.append((self.name, request, *arguments))
        self._fail(request)
        if request == "memory":
            return 5e6
        if request == "check":
            return dict(ERRORS)
        if request == "prepare":
            return 0.5
        return Timed([1.0 if self.name == "fastmaf" else 3.0], "a note" if self.name != "fastmaf" else "")

    @property
    def alive(self) -> bool:
        return not self.dead

    def close(self) -> None:
        self.events.append((self.name, "close"))
        self.open.discard(id(self))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    monkeypatch.setattr(Pretended, "events", [], raising=False)
    monkeypatch.setattr(Pretended, "fails", {}, raising=False)
    monkeypatch.setattr(Pretended, "open", set(), raising=False)
    monkeypatch.setattr(running, "Worker", Pretended)
    monkeypatch.setattr(running, "REST", 0.0)
    monkeypatch.setattr(running, "_draw_images", lambda folder, count, pixels: None)
    monkeypatch.setattr(machine, "free_bytes", lambda device: 10**15)
    for name, entry in entries().items():
        monkeypatch.setitem(SIDES, name, entry)
    known_limits(monkeypatch)
    return Pretended


def tiny_run(sides: tuple[str, ...] = ("fastmaf", "naive", "dense"), *cases: Case, **options: Any) -> Result:
    return run(plan_of(sides, cases or every_case(), **options), seed=1)


def sides_in(result: Result) -> set[str]:
    return {row["side"] for row in result.rows}


@pytest.mark.parametrize("name", ["quick", "full"])
def test_a_run_with_nothing_missing_gives_as_many_rows_as_the_plan_has_parts(
    name: str, pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_row", lambda measured, limits: measured)  # sizes of 49,152 take a while
    plan = planned(name)
    said: list[int] = []
    result = run(plan, lambda _, parts: said.append(parts), seed=1)
    assert (result.left_out, result.wrong) == ([], [])
    assert len(result.rows) == plan.parts == sum(said)
    assert not pretended.open


def test_a_side_is_compared_before_anything_of_it_is_timed(pretended: type[Pretended]) -> None:
    tiny_run()
    for name in ("fastmaf", "naive", "dense"):
        asked = [event[1] for event in pretended.events if event[0] == name]
        assert asked.index("check") < asked.index("prepare") < asked.index("time")


def test_memory_is_asked_for_before_the_twin_takes_some_and_sampling_before_training(
    pretended: type[Pretended],
) -> None:
    tiny_run()
    for name in ("fastmaf", "naive", "dense"):
        asked = [event[1:3] if event[1] == "memory" else event[1] for event in pretended.events if event[0] == name]
        assert asked.index(("memory", "sampling memory")) < asked.index(("memory", "training memory"))
        assert asked.index(("memory", "training memory")) < asked.index("check")


def test_two_sides_are_timed_in_turn(pretended: type[Pretended]) -> None:
    tiny_run(("fastmaf", "naive"), SCORE[1], rounds=3)
    turns = [event[0] for event in pretended.events if event[1] == "time"]
    assert turns == ["fastmaf"] * 3 + ["fastmaf", "naive"] * 3
    warm = [event[0] for event in pretended.events if event[1] == "prepare"]
    assert warm == ["fastmaf", "fastmaf", "naive"], "both are warm before the first is timed"


def test_times_are_compared_with_those_of_fastmaf_beside_them(pretended: type[Pretended]) -> None:
    result = tiny_run()
    for row in result.rows:
        if row["unit"] == "s":
            expected = 1.0 if row["side"] == "fastmaf" else 3.0
            assert float(row["times_fastmaf"]) == expected, row
    assert {row["note"] for row in result.rows if row["case"] == "sample"} == {"", "a note"}


def test_the_ratio_is_the_median_of_those_of_the_rounds(
    pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the machine slows down as a whole, a round slows down for both."""
    rounds = {"fastmaf": iter([9.0] * 5 + [1.0, 2.0, 10.0, 1.0, 1.0]), "naive": iter([3.0, 6.0, 30.0, 3.0, 50.0])}
    ask = Pretended.ask

    def slowing(self: Pretended, request: str, *arguments: Any) -> Any:
        answer = ask(self, request, *arguments)
        return Timed([next(rounds[self.name])]) if request == "time" else answer

    monkeypatch.setattr(Pretended, "ask", slowing)
    row = tiny_run(("fastmaf", "naive"), SCORE[1], rounds=5).rows[-1]
    assert row["side"] == "naive" and float(row["times_fastmaf"]) == 3.0
    assert float(row["median"]) == 6.0 and row["repeats"] == "5"


def test_builds_are_compared_warm_with_warm_and_first_with_first(
    pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tiny_run(("fastmaf", "naive"), BUILD).rows[-1]
    assert (float(row["median"]), float(row["first"]), float(row["times_fastmaf"])) == (6.0, 7.0, 3.0)
    start = Pretended.__init__

    def built_once(self: Pretended, name: str, *arguments: Any) -> None:
        start(self, name, *arguments)
        if name == "naive":
            self.build_seconds = [10.0]

    monkeypatch.setattr(Pretended, "__init__", built_once)
    row = tiny_run(("fastmaf", "naive"), BUILD).rows[-1]
    assert (float(row["median"]), float(row["times_fastmaf"]), row["repeats"]) == (10.0, 4.0, "1")


def test_rows_of_some_threads_have_the_limits_of_those_threads(
    pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def limits() -> dict[str, float]:
        return LIMITS | {"read_gb_per_s": 1e-3 * torch.get_num_threads(), "launch_us": 0.0}

    monkeypatch.setattr(machine, "limits", limits)
    sweep = Sweep("threads", ((TINY, 2), (TINY, 4)), ("fastmaf",), (SCORE[1],))
    rows = tiny_run(("fastmaf",), SCORE[1], sweeps=(sweep,)).rows
    alone = 4 * visible_weights(TINY) / 1e6
    assert [row["threads"] for row in rows] == ["1", "2", "4"]
    assert [float(row["limit"]) for row in rows] == pytest.approx([alone, alone / 2, alone / 4], rel=1e-4)
    assert torch.get_num_threads() == 1, "as before"


def test_a_slow_case_has_three_rounds_and_no_more(pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ENOUGH", 0.0)
    assert [row["repeats"] for row in tiny_run(("fastmaf",), SCORE[1], rounds=7).rows] == ["3"]
    assert [row["repeats"] for row in tiny_run(("fastmaf",), SCORE[1], rounds=2).rows] == ["2"]


def test_what_other_processes_took_is_said(pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch) -> None:
    ask, share = Pretended.ask, [0.0]

    def beside_others(self: Pretended, request: str, *arguments: Any) -> Any:
        answer = ask(self, request, *arguments)
        return answer._replace(others=share[0]) if request == "time" else answer

    monkeypatch.setattr(Pretended, "ask", beside_others)
    for share[0], said in ((0.05, ""), (0.42, "other processes took 42% of the processors")):
        fast, naive = tiny_run(("fastmaf", "naive"), SCORE[1]).rows
        assert fast["note"] == said
        assert naive["note"] == (f"a note; {said}" if said else "a note")


def test_the_share_of_others_is_a_share() -> None:
    busy = machine.Busy()
    assert busy.others() == 0.0, "too short to tell"
    time.sleep(0.15)
    assert 0.0 <= busy.others() <= 1.0


def test_the_check_is_told_every_batch_that_will_be_timed(pretended: type[Pretended]) -> None:
    tiny_run(("fastmaf",), *SCORE, *SAMPLE, *TRAIN)
    batches = next(event[3] for event in pretended.events if event[1] == "check")
    assert batches == {"log_prob": [1, 8, 64], "sample": [1, 5, 64], "train step": [8, 64]}


@pytest.mark.parametrize(("images", "steps"), [(219, 28), (24, 3), (19, 3), (4, 1)])
def test_an_epoch_is_done_in_as_many_steps_as_its_limit_counts(
    images: int, steps: int, pretended: type[Pretended]
) -> None:
    case = epoch(images)
    assert case.steps == steps
    tiny_run(("fastmaf", "naive"), case)
    asked = [event for event in pretended.events if event[1] == "epoch"]
    for _, _, _, pixels, batch, _ in asked:
        assert pixels == 4
        assert -(-images // batch) == steps, f"an epoch of {images} images in batches of {batch}"


def test_a_wrong_fastmaf_is_not_what_others_are_compared_with(pretended: type[Pretended]) -> None:
    """Its time is that of wrong results: it must not be shown in the ratios of others either."""
    pretended.fails["fastmaf", "check"] = WrongResultError("log_prob is off by 1e-3, more than 1e-05")
    result = tiny_run()
    assert result.wrong == ["fastmaf at D = 48, hidden (16, 16), 2 blocks: log_prob is off by 1e-3, more than 1e-05"]
    assert sides_in(result) == {"naive", "dense"}
    assert {row["times_fastmaf"] for row in result.rows} == {""}


def test_without_fastmaf_the_others_are_measured_alone(pretended: type[Pretended]) -> None:
    pretended.fails["fastmaf", "start"] = SideError("fastmaf: OSError: no library")
    result = tiny_run()
    assert result.left_out == ["fastmaf at D = 48, hidden (16, 16), 2 blocks: fastmaf: OSError: no library"]
    assert len(result.rows) == 2 * len(every_case())
    assert {row["times_fastmaf"] for row in result.rows} == {""}


@pytest.mark.parametrize("request_", ["check", "time", "epoch"])
def test_the_run_goes_on_where_the_process_of_fastmaf_ends(request_: str, pretended: type[Pretended]) -> None:
    pretended.fails["fastmaf", request_] = SideError("the process of fastmaf ended with exit status -9")
    result = tiny_run()
    assert sides_in(result) >= {"naive", "dense"}, result.left_out
    assert [sentence for sentence in result.left_out if not sentence.startswith("fastmaf")] == []


def test_the_run_goes_on_where_the_process_of_fastmaf_ends_beside_another_side(
    pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Pretended.ask

    def dying(self: Pretended, request: str, *arguments: Any) -> Any:
        naive = any(event[0] == "naive" for event in self.events)
        if self.name == "fastmaf" and naive:
            self.dead = True
            raise SideError("the process of fastmaf ended with exit status -9")
        return ask(self, request, *arguments)

    monkeypatch.setattr(Pretended, "ask", dying)
    result = tiny_run()
    assert sides_in(result) == {"fastmaf", "dense"}
    assert {row["times_fastmaf"] for row in result.rows if row["side"] == "dense"} == {""}
    assert len(result.left_out) == 1 and "the process of fastmaf ended" in result.left_out[0]
    assert not pretended.open


@pytest.mark.parametrize("request_", ["start", "memory", "check", "prepare", "time", "epoch"])
@pytest.mark.parametrize(
    "error",
    [SideError("naive: ValueError: no"), SideError("the process of naive ended with exit status 1"), ImportError("no")],
    ids=["raises", "ends", "misses a package"],
)
def test_the_run_goes_on_where_a_side_fails(request_: str, error: Exception, pretended: type[Pretended]) -> None:
    pretended.fails["naive", request_] = error
    result = tiny_run()
    assert [sentence.startswith("naive at D = 48") for sentence in result.left_out] == [True]
    assert str(error) in result.left_out[0]
    assert sides_in(result) >= {"fastmaf", "dense"}
    assert not pretended.open, "a process was left"


def test_nothing_is_timed_of_a_side_with_wrong_results(pretended: type[Pretended]) -> None:
    pretended.fails["naive", "check"] = WrongResultError("inverse is off by nan, more than 1e-04")
    result = tiny_run()
    assert result.wrong == ["naive at D = 48, hidden (16, 16), 2 blocks: inverse is off by nan, more than 1e-04"]
    assert sides_in(result) == {"fastmaf", "dense"} and result.left_out == []
    assert {event[1] for event in pretended.events if event[0] == "naive"} == {"start", "memory", "check", "close"}


def test_a_side_that_was_wrong_in_a_sweep_keeps_its_rows_of_the_cases(
    pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is vouched for by the check of its own process."""
    ask = Pretended.ask

    def wrong_when_small(self: Pretended, request: str, *arguments: Any) -> Any:
        if request == "check" and self.name == "naive" and self.size.features == 12:
            raise WrongResultError("log_prob is off by 1")
        return ask(self, request, *arguments)

    monkeypatch.setattr(Pretended, "ask", wrong_when_small)
    sweep = Sweep(
        "features", ((Size(12, (8, 8), 1), None), (Size(24, (8, 8), 1), None)), ("fastmaf", "naive"), (SCORE[1],)
    )
    result = tiny_run(("fastmaf", "naive"), SCORE[1], sweeps=(sweep,))
    found = [(row["sweep"], row["side"], row["features"]) for row in result.rows]
    assert found == [
        ("", "fastmaf", "48"), ("", "naive", "48"),
        ("features", "fastmaf", "12"),
        ("features", "fastmaf", "24"), ("features", "naive", "24"),
    ]  # fmt: skip
    assert len(result.wrong) == 1 and "D = 12" in result.wrong[0]


@pytest.mark.parametrize("request_", ["memory", "check", "time"])
def test_an_interrupted_run_leaves_no_process(
    request_: str, pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Pretended.ask

    def interrupted(self: Pretended, request: str, *arguments: Any) -> Any:
        if self.name == "naive" and request == request_:
            raise KeyboardInterrupt
        return ask(self, request, *arguments)

    monkeypatch.setattr(Pretended, "ask", interrupted)
    result = tiny_run()
    assert result.left_out == ["whatever came after Ctrl-C"]
    assert sides_in(result) == {"fastmaf"}, "what was measured before is kept"
    assert not pretended.open


def test_a_side_that_would_not_fit_into_memory_is_not_started(
    pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    result = tiny_run()
    assert result.rows == [] and pretended.events == []
    assert len(result.left_out) == 3
    for name, told in zip(("fastmaf", "naive", "dense"), result.left_out, strict=True):
        assert re.fullmatch(rf"{name} at D = 48, .*: needs about [\d.]+ GB; [\d.]+ GB are free", told), told


def test_where_memory_is_not_told_there_is_no_row_of_it(
    pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Pretended.ask
    monkeypatch.setattr(
        Pretended, "ask", lambda self, request, *args: None if request == "memory" else ask(self, request, *args)
    )
    result = tiny_run(("fastmaf", "naive"), SCORE[1], *MEMORY)
    assert [row["case"] for row in result.rows] == ["log_prob", "log_prob"]


def test_a_flow_that_takes_no_memory_that_shows_does_not_end_the_run(
    pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Pretended.ask
    monkeypatch.setattr(
        Pretended, "ask", lambda self, request, *args: 0 if request == "memory" else ask(self, request, *args)
    )
    result = tiny_run(("fastmaf",), SCORE[1], *MEMORY)
    assert [row["case"] for row in result.rows] == ["log_prob", "build memory", "training memory", "sampling memory"]


@pytest.mark.parametrize("name", ["quick", "full"])
def test_a_run_told_everything_that_it_did(
    name: str, pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sides are missing, the bar reaches its end all the same."""
    monkeypatch.setattr(running, "_row", lambda measured, limits: measured)
    pretended.fails["zuko", "start"] = ImportError("zuko is not installed")
    pretended.fails["nflows", "check"] = WrongResultError("inverse is off by 1")
    plan, said = planned(name), [0]
    run(plan, lambda _, parts: said.append(parts), seed=1)
    assert sum(said) == plan.parts


def test_seeds_are_drawn_anew_unless_one_is_given(pretended: type[Pretended]) -> None:
    plan = plan_of(("fastmaf",), (SCORE[1],))
    seeds = {run(plan).about["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert run(plan, seed=11).about["seed"] == "11"
    assert [event[2] for event in pretended.events if event[1] == "check"][-1] == 11


def test_all_constants_are_in_use() -> None:
    """A guard on this file: the tiny plan has one of each kind of case that the real plans have."""
    assert {case.name for case in every_case()} == {case.name for case in cases.FULL.cases}
    assert {FILES[0].name, FILES[1].name} <= {case.name for case in every_case()}


def test_the_row_of_fastmaf_is_of_all_the_time_in_which_others_were_measured(pretended: type[Pretended]) -> None:
    result = tiny_run(("fastmaf", "naive", "dense"), SCORE[1], TRAIN[0], rounds=3)
    repeats = {(row["side"], row["case"]): row["repeats"] for row in result.rows}
    for case in ("log_prob", "train step"):
        assert repeats["fastmaf", case] == "9", "three rounds by itself, and three with each of two others"
        assert repeats["naive", case] == repeats["dense", case] == "3"
