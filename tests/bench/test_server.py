"""What the process of a side does, without the process: its repeats, its extrapolations, its refusals."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmaf.bench import run as running
from fastmaf.bench.check import WrongResultError
from fastmaf.bench.sides import Size, side_class
from fastmaf.bench.worker import Server, Timed
from tests.bench.plans import (
    TINY,
    one_thread,
)


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    with one_thread():
        yield


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
