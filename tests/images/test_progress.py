"""Bars on a terminal, a line per tenth of the work in a log, and notes in between."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastmaf.images.progress import Progress, note, track


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


class Bare:
    """A stream with nothing but ``write``, as some consoles set."""

    def write(self, text: str) -> None: ...


class Clock:
    """Seconds that pass only when ``wait`` is called."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def fitting(clock: Clock, log: io.StringIO) -> Callable[..., Any]:
    """Returns the progress of fitting models, written to ``log``."""

    def made(items: Any = None, **options: Any) -> Any:
        arguments = {"description": "fitting", "unit": "model", "stream": log, "clock": clock, **options}
        return Progress(**arguments) if items is None else track(items, **arguments)

    return made


def test_a_log_has_a_line_per_tenth_of_the_work(fitting: Any, clock: Clock, log: io.StringIO) -> None:
    for _ in fitting(range(40)):
        clock.wait(2)
    lines = log.getvalue().splitlines()
    assert lines[2] == "fitting: 30% (12 of 40 models), 24 s"
    assert [line.split(",")[0] for line in lines] == [
        f"fitting: {10 * n}% ({4 * n} of 40 models)" for n in range(1, 11)
    ]
    assert "\r" not in log.getvalue()


def test_few_units_have_a_line_each(fitting: Any, clock: Clock, log: io.StringIO) -> None:
    for _ in fitting(range(3)):
        clock.wait(100)
    assert log.getvalue().splitlines() == [
        "fitting: 33% (1 of 3 models), 1 min 40 s",
        "fitting: 66% (2 of 3 models), 3 min 20 s",
        "fitting: 100% (3 of 3 models), 5 min 00 s",
    ]


def test_a_single_unit_and_hours(fitting: Any, clock: Clock, log: io.StringIO) -> None:
    for _ in fitting([0], unit="batch"):
        clock.wait(7500)
    assert log.getvalue() == "fitting: 100% (1 of 1 batch), 2 h 05 min\n"


def test_the_first_two_seconds_leave_no_line(fitting: Any, clock: Clock, log: io.StringIO) -> None:
    for _ in fitting(range(1000)):
        clock.wait(0.0019)
    assert log.getvalue() == ""
    for _ in fitting(range(100)):
        clock.wait(0.03)
    assert re.findall(r"(\d+)%", log.getvalue()) == ["70", "80", "90", "100"]


def test_several_units_at_once(fitting: Any, clock: Clock, log: io.StringIO) -> None:
    with fitting(total=100) as bar:
        for n in (5, 30, 4, 61):
            clock.wait(3)
            bar.update(n)
    assert re.findall(r"(\d+)%", log.getvalue()) == ["35", "100"]


def test_a_resumed_work_counts_from_where_it_was(fitting: Any, clock: Clock, log: io.StringIO) -> None:
    with fitting(total=20, initial=9) as bar:
        for _ in range(11):
            clock.wait(5)
            bar.update()
    assert re.findall(r"\((\d+) of 20", log.getvalue()) == ["10", "12", "14", "16", "18", "20"]


def test_work_that_ends_early_has_no_last_line(fitting: Any, clock: Clock, log: io.StringIO) -> None:
    with pytest.raises(ZeroDivisionError), fitting(total=10) as bar:
        clock.wait(5)
        bar.update(5)
        raise ZeroDivisionError
    assert log.getvalue() == "fitting: 50% (5 of 10 models), 5 s\n"


def test_without_a_total_lines_come_after_ever_longer_times(fitting: Any, clock: Clock, log: io.StringIO) -> None:
    def models() -> Iterator[int]:
        for i in range(1200):
            clock.wait(1)
            yield i

    for _ in fitting(models()):
        pass
    counts = re.findall(r"^fitting: ([\d,]+) models, ", log.getvalue(), re.MULTILINE)
    assert counts == ["2", "4", "8", "16", "32", "64", "128", "256", "512", "1,024", "1,200"]


def test_description_and_status_are_in_the_lines(fitting: Any, clock: Clock, log: io.StringIO) -> None:
    with fitting(total=2, unit="result") as bar:
        for name, nll in (("one", 3), ("two", 2)):
            clock.wait(5)
            bar.set_description(name)
            bar.set_status(f"NLL {nll} nats")
            bar.update()
    assert (
        log.getvalue() == "one: 50% (1 of 2 results), 5 s; NLL 3 nats\ntwo: 100% (2 of 2 results), 10 s; NLL 2 nats\n"
    )


def test_in_a_log_only_the_outermost_work_reports(fitting: Any, clock: Clock, log: io.StringIO) -> None:
    for _ in fitting(range(2), description="outer"):
        for _ in fitting(range(10), description="inner"):
            clock.wait(5)
    assert [line.split(":")[0] for line in log.getvalue().splitlines()] == ["outer"] * 2
    for _ in fitting(range(10), description="inner"):
        clock.wait(5)
        break
    for _ in fitting(range(1), description="after it"):
        clock.wait(5)
    assert log.getvalue().splitlines()[-1].startswith("after it: 100%")


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_nothing_is_shown_where_it_is_not_wanted(fitting: Any, clock: Clock, stream: Callable[[], io.StringIO]) -> None:
    shown = stream()
    for _ in fitting(range(10), show=False, stream=shown):
        clock.wait(5)
    assert shown.getvalue() == ""


def test_a_terminal_has_a_bar_that_vanishes(fitting: Any) -> None:
    terminal = Terminal()
    with fitting(total=4, stream=terminal) as bar:
        bar.set_status("NLL 3 nats")
        bar.update(4)
    text = terminal.getvalue()
    assert "fitting" in text and "0/4" in text and "\r" in text
    assert text.rsplit("\r", 2)[1].strip() == "" and "\n" not in text


def test_a_bar_that_is_left_shows_the_last_state(fitting: Any) -> None:
    terminal = Terminal()
    with fitting(total=4, initial=1, leave=True, stream=terminal) as bar:
        bar.set_status("NLL 3 nats")
        bar.update(3)
    last = terminal.getvalue().rsplit("\r", 1)[1]
    assert last.startswith("fitting: 100%") and "4/4" in last and "NLL 3 nats" in last and last.endswith("\n")


def test_nested_bars_and_notes_share_a_terminal(fitting: Any) -> None:
    terminal = Terminal()
    for _ in fitting(range(2), description="outer", stream=terminal):
        for _ in fitting(range(2), description="inner", stream=terminal):
            note("a note", terminal)
    assert terminal.getvalue().count("a note\n") == 4
    assert re.search(r"\router.*\n\rinner", terminal.getvalue())


def test_a_note_is_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    note("part\x1b[2J\nnumber 1")
    assert capsys.readouterr() == ("", "part\\x1b[2J\\x0anumber 1\n")


def test_a_missing_closed_or_broken_stream_is_no_error(
    fitting: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", None)
    for stream in (None, closed, Broken(), Bare()):
        done = []
        for i in fitting(range(3), stream=stream):
            clock.wait(5)
            note("a note", stream)
            done.append(i)
        assert done == [0, 1, 2]
    assert capsys.readouterr().out == ""
