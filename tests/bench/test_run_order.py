"""The order in which a run asks its sides, and what becomes of one that fails: with sides that only pretend."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastmaf.bench import cases, machine
from fastmaf.bench import run as running
from fastmaf.bench.cases import BUILD, FILES, MEMORY, SAMPLE, SCORE, TRAIN, Case, Sweep, epoch, planned
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.run import Result, run
from fastmaf.bench.sides import SIDES, Size
from fastmaf.bench.worker import SideError, Timed
from tests.bench.plans import (
    LIMITS,
    TINY,
    entries,
    every_case,
    known_limits,
    one_thread,
    plan_of,
    visible_weights,
)


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    with one_thread():
        yield


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
