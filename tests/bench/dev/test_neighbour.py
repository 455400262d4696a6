"""Timing a flow beside busy processes: what is run, what is printed, and that no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import fastmaf
from fastmaf.bench.dev import neighbour

pytestmark = pytest.mark.slow  # processes are started and killed

ROOT = Path(__file__).parents[3]


def running(process: psutil.Process | subprocess.Popen[bytes]) -> bool:
    return psutil.pid_exists(process.pid) and psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.skipif(not hasattr(os, "nice"), reason="processes have no niceness here")
def test_neighbours_are_busy_have_their_priority_and_end() -> None:
    own = psutil.Process().nice()
    with neighbour.neighbours(2, 3) as started:
        assert len(started) == 2 and all(map(running, started))
        for process in map(psutil.Process, (process.pid for process in started)):
            assert process.nice() == min(own + 3, 19)
            before = process.cpu_times().user
            deadline = time.monotonic() + 20
            while process.cpu_times().user == before and time.monotonic() < deadline:
                time.sleep(0.05)
            assert process.cpu_times().user > before
    assert not any(map(running, started))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_neighbour_is_left_after_an_error(error: type[BaseException]) -> None:
    before = set(psutil.Process().children(recursive=True))

    def fail() -> None:
        calls.append(len(set(psutil.Process().children()) - before))
        if calls[-1]:
            raise error

    calls: list[int] = []
    with pytest.raises(error):
        neighbour.measure({"log_prob 1": fail}, 2, rounds=1, seconds=0.0)
    assert calls[-1] == 2 and set(psutil.Process().children(recursive=True)) <= before


def test_no_neighbour_is_left_if_the_program_is_killed() -> None:
    program = (
        "import time; from fastmaf.bench.dev import neighbour\n"
        "with neighbour.neighbours(1) as started:\n"
        "    print(started[0].pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        busy = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    deadline = time.monotonic() + 20
    while running(busy) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(busy)


def test_every_case_is_timed_alone_and_beside_both_kinds_of_neighbours() -> None:
    calls = neighbour.calls(fastmaf.MAF(5, 2, (9, 7), seed=0), (1, 3))
    times = neighbour.measure(calls, 1, rounds=2, seconds=0.0)
    assert [list(found) for found in times] == [["log_prob 1", "log_prob 3", "sample 1", "train step 3"]] * 3
    assert all(len(values) == 2 and min(values) > 0 for found in times for values in found.values())


def test_the_table_has_the_ratios_of_the_medians_and_the_target() -> None:
    alone, equals, lower = {"a": [1.0, 3.0, 2.0], "b": [0.1]}, {"a": [5.0], "b": [0.2]}, {"a": [2.0], "b": [0.26]}
    lines = [" ".join(line.split()) for line in neighbour.table([alone, equals, lower]).splitlines()]
    assert lines[0].endswith("target 2.5")
    assert lines[1:] == [
        "a 2.00 s 5.00 s 2.50 2.00 s 1.00 met",
        "b 100 ms 200 ms 2.00 260 ms 2.60 missed",
    ]


def test_the_program_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--features", "5", "--hidden", "9", "--blocks", "1"]
    neighbour.main([*size, "--neighbours", "1", "--rounds", "1", "--seconds", "0"])
    output = capsys.readouterr().out
    assert output.startswith("5 features, 1 neighbours") and "\ntrain step 8 " in output
