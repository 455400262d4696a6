"""A library in its process: repeats, extrapolation, refusals, and processes that end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastmaf.bench.check import BATCHES, WrongResultError
from fastmaf.bench.libraries import LIBRARIES, Size
from fastmaf.bench.worker import LibraryError, Server, Worker
from fastmaf.capsule.synthetic import draw_dataset
from tests.bench.helpers import TINY, register_failing

pytestmark = pytest.mark.slow  # processes are started, stopped and killed

ROOT = Path(__file__).parents[2]
SMALL = Size(12, (8, 8), 1)


def worker_of(name: str, threads: int | None = None) -> contextlib.closing[Worker]:
    return contextlib.closing(Worker(name, SMALL, 0, threads))


def server_of(name: str, size: Size = TINY) -> Server:
    return Server(LIBRARIES[name], size, 0)


def test_samples_are_extrapolated_where_all_passes_take_too_long(tmp_path: Path) -> None:
    server, counts = server_of("naive"), []
    library: Any = server.library
    inverse = library.inverse
    library.inverse = lambda z, passes: (counts.append((len(z), passes)), inverse(z, passes))[1]
    server.prepare("sample", 5, 1e-9, str(tmp_path))
    assert server.time("sample", 5, 1e-9).note == "extrapolated: 4 of 96 passes"
    assert set(counts) == {(5, 4)}
    server.prepare("sample", 5, 1e9, str(tmp_path))
    assert server.time("sample", 5, 1e-9).note == ""


@pytest.mark.parametrize("name", ["naive", "dense"])
def test_a_flow_of_fewer_dimensions_than_the_passes_that_are_tried_is_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = server_of(name, Size(2, (8, 8), 3))
    server.prepare("sample", 3, 1e9, str(tmp_path))
    assert server.time("sample", 3, 1e-9).note == ""
    # So few numbers may fit into memory that the process has: the passes are looked at, not the bytes.
    passes, inverse = [], server.library.inverse
    monkeypatch.setattr(server.library, "inverse", lambda z, n: (passes.append(n), inverse(z, n))[1])
    server.memory("sampling memory", 3)
    assert passes == [2]


def test_an_extrapolated_time_is_that_of_all_passes_of_which_a_block_is_timed_at_most(tmp_path: Path) -> None:
    server = server_of("naive", Size(12, (8, 8), 40))
    library: Any = server.library
    library.inverse = lambda z, passes: time.sleep(5e-3 * passes)
    server.prepare("sample", 1, 0.15, str(tmp_path))
    timed = server.time("sample", 1, 1e-9)
    assert timed.note == "extrapolated: 12 of 480 passes"
    assert min(timed.seconds) >= 480 * 5e-3


@pytest.mark.parametrize("case", ["log_prob", "train step", "save", "load"])
def test_a_case_is_repeated_for_its_seconds_and_at_least_once(case: str, tmp_path: Path) -> None:
    server = server_of("naive")
    assert server.prepare(case, 8, 1e-9, str(tmp_path)) > 0
    assert len(server.time(case, 8, 1e-9).seconds) == 1
    calls = []
    server._clock = lambda call: calls.append(call()) or 0.02  # type: ignore[assignment, func-returns-value]
    assert server.time(case, 8, 0.05).seconds == [0.02, 0.02], "of three calls the first is left out"
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["fastmaf", "naive"])
def test_weights_that_are_not_restored_are_refused(name: str, tmp_path: Path) -> None:
    server = server_of(name)
    library: Any = server.library
    library.load = lambda path: None
    with pytest.raises(WrongResultError, match="loaded weights give other densities"):
        server.prepare("load", 0, 0.1, str(tmp_path))


def test_an_epoch_takes_a_step_for_each_batch_or_extrapolates(tmp_path: Path) -> None:
    draw_dataset(str(tmp_path), train=19, good=0, defects={}, size=32, progress=False)
    server, sizes = server_of("naive"), []
    library: Any = server.library
    library.train_step = lambda x: sizes.append(tuple(x.shape))
    assert "extrapolated" not in server.epoch(str(tmp_path), 8, 100.0).note
    assert sizes[1:] == [(8, 48), (8, 48), (3, 48)], "after one step to warm up"
    timed = server.epoch(str(tmp_path), 8, 0.0)
    assert timed.note.endswith(", extrapolated: 1 of 3 steps") and timed.seconds[0] > 0


def test_a_worker_is_suspended_between_requests_and_ends_with_them() -> None:
    with worker_of("naive") as worker:
        assert len(worker.build_seconds) == 3 and min(worker.build_seconds) > 0
        assert becomes(lambda: worker.process.status() == psutil.STATUS_STOPPED)
        assert set(worker.ask("check", 1, BATCHES)) == {"log_prob", "inverse", "train step"}
        with pytest.raises(LibraryError, match="AttributeError: .*no_such_request"):
            worker.ask("no_such_request")
        assert worker.alive
        worker.process.kill()
        with pytest.raises(LibraryError, match="the process of naive ended"):
            worker.ask("check", 1, BATCHES)
        assert not worker.alive
    assert not psutil.pid_exists(worker.process.pid)


def test_failures_of_a_library_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    register_failing(monkeypatch)
    with pytest.raises(ImportError, match="absent is not installed"):
        Worker("absent", SMALL, 0)
    for name, error, message in (
        ("wrong", WrongResultError, "log_prob is off by"),
        ("raising", LibraryError, "ArithmeticError: no samples today"),
        ("dying", LibraryError, "the process of dying ended"),
    ):
        with worker_of(name) as worker, pytest.raises(error, match=message):
            worker.ask("check", 1, BATCHES)
    with worker_of("hanging") as worker:
        worker.timeout = 0.3
        with pytest.raises(LibraryError, match="hanging did not answer within"):
            worker.ask("check", 1, BATCHES)
        assert not worker.alive


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads of other libraries cannot be limited here")
def test_a_worker_has_the_threads_and_the_environment_of_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "FASTMAF_TEST_VARIABLE"
    monkeypatch.setitem(LIBRARIES, "naive", LIBRARIES["naive"]._replace(environment=((name, "7"),)))
    with worker_of("naive", threads=1) as worker:
        worker.process.resume()
        assert worker.process.environ()[name] == "7" and name not in os.environ
        assert len(worker.process.cpu_affinity()) == 1


KILLED = """
import os
from fastmaf.bench.libraries import Size
from fastmaf.bench.worker import Worker

if __name__ == "__main__":
    print(Worker("naive", Size(12, (8, 8), 1), 0).process.pid, flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a suspended process does not notice")
def test_a_suspended_worker_ends_when_the_run_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, cwd=ROOT, capture_output=True, text=True)
    process = int(done.stdout)
    try:
        assert becomes(lambda: not runs(process))
    finally:
        if runs(process):
            os.kill(process, signal.SIGKILL)


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def becomes(condition: Callable[[], bool]) -> bool:
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False
