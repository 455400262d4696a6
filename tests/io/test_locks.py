"""The lock of a run's folder: who is refused, who is named, and what a killed process leaves."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from fastmaf.io import locks
from fastmaf.io.locks import InUseError, run_lock

ROOT = Path(__file__).parents[2]
HOLDER = """
    import sys
    from pathlib import Path
    from fastmaf.io.locks import run_lock
    with run_lock(Path(sys.argv[1]), "training"):
        print("ready", flush=True)
        sys.stdin.read()
"""
OTHER = {"host": "elsewhere", "since": "2026-01-02 03:04:05 UTC", "doing": "training"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def lock_file(model: Path) -> Path:
    return model.with_name(".model.safetensors.lock")


def holding(model: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(model)]
    holder = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
    return holder


def test_a_second_process_is_refused_and_told_who_holds_the_lock(model: Path) -> None:
    with holding(model) as holder:
        words = rf"model.safetensors is in use: process {holder.pid} on {platform.node()}, training since 20.* UTC"
        with pytest.raises(InUseError, match=words), run_lock(model, "calibrating"):
            pass
        assert lock_file(model).exists(), "the refused one leaves the lock alone"
        assert holder.stdin is not None
        holder.stdin.close()
        assert holder.wait(timeout=60) == 0
    with run_lock(model, "calibrating"):
        pass
    assert os.listdir(model.parent) == []


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_the_lock_of_a_killed_process_is_taken_over(model: Path) -> None:
    with holding(model) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=60)
    assert json.loads(lock_file(model).read_text())["pid"] == holder.pid
    with run_lock(model, "training"):
        assert json.loads(lock_file(model).read_text())["pid"] == os.getpid()
    assert os.listdir(model.parent) == []


def test_a_second_thread_is_refused_too(model: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        try:
            with run_lock(model, "training"):
                refused.append("not refused")
        except InUseError as error:
            refused.append(str(error))

    with run_lock(model, "training"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    (text,) = refused
    assert f"this process {os.getpid()} on {platform.node()}" in text
    with run_lock(model, "training"):
        pass


def test_the_lock_is_given_back_after_an_error(model: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run_lock(model, "training"):
        raise KeyboardInterrupt
    with run_lock(model, "training"):
        pass


def test_two_models_of_one_folder_do_not_exclude_each_other(model: Path) -> None:
    with run_lock(model, "calibrating"), run_lock(model.with_name("other.safetensors"), "calibrating"):
        pass


def test_a_process_of_another_host_cannot_be_judged(model: Path) -> None:
    lock_file(model).write_text(json.dumps({"pid": 7, **OTHER}))
    words = rf"process 7 on elsewhere, training since 2026-01-02.*if that process has ended, delete {lock_file(model)}"
    with pytest.raises(InUseError, match=words), run_lock(model, "training"):
        pass
    lock_file(model).unlink()
    with run_lock(model, "training"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "\0" * 100, json.dumps({"pid": 5})])
def test_a_lock_file_that_was_cut_off_is_taken_over(model: Path, text: str) -> None:
    lock_file(model).write_text(text)
    with run_lock(model, "training"):
        assert json.loads(lock_file(model).read_text())["pid"] == os.getpid()


@pytest.mark.skipif(os.name == "nt", reason="Windows has locks on every file system")
def test_where_there_are_no_locks_the_process_id_decides(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_lock", lambda file: False)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=60)
    here = {**OTHER, "host": platform.node()}
    lock_file(model).write_text(json.dumps({"pid": os.getppid(), **here}))
    with pytest.raises(InUseError, match=f"process {os.getppid()} on"), run_lock(model, "training"):
        pass
    lock_file(model).write_text(json.dumps({"pid": gone.pid, **here}))
    with run_lock(model, "training"), pytest.raises(InUseError, match="this process"), run_lock(model, "training"):
        pass


def test_a_folder_that_is_not_there_is_an_ordinary_error(tmp_path: Path) -> None:
    folder = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as caught, run_lock(folder / "m.safetensors", "training"):
        pass
    assert caught.value.filename == str(folder)


def test_a_lock_that_finds_no_room_leaves_nothing_and_names_the_folder(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks, "_write", full)
    with pytest.raises(OSError, match="No space left") as caught, run_lock(model, "training"):
        pass
    assert caught.value.filename == str(model.parent) and os.listdir(model.parent) == []
    monkeypatch.undo()
    with run_lock(model, "training"):
        pass
