"""Files that appear whole or not at all, and what is left when they cannot."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fastmaf.io import atomic, locks, tensor_file
from fastmaf.io.atomic import keep_previous, staging, sweep, written_atomically
from fastmaf.io.tensor_file import read_tensors, write_tensors
from tests.faults import hidden

ROOT = Path(__file__).parents[2]


def write(path: Path, content: bytes) -> None:
    with written_atomically(path) as file:
        file.write(content)


def test_a_file_appears_only_when_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with written_atomically(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it" and hidden(path.parent) == []


@pytest.mark.parametrize("operation", ["mkdir", "fsync", "replace"])
def test_a_failure_at_any_step_leaves_the_old_content_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    path = tmp_path / "a.txt"
    write(path, b"old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))

    monkeypatch.setattr(os, operation, full)
    with pytest.raises(OSError, match="No space left"):
        write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.txt"]


def test_an_interrupt_in_the_block_leaves_the_old_content_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"old")
    with pytest.raises(KeyboardInterrupt), written_atomically(tmp_path / "a.txt") as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "a.txt", b"1")
        write_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_tensors_on_a_full_disk_raise_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.safetensors"))
    assert os.listdir(tmp_path) == []


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from fastmaf.io.atomic import staging, written_atomically
    with written_atomically(Path(sys.argv[1]) / "a.txt") as file:
        file.write(b"half")
        file.flush()
        if sys.argv[2] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        print("ready", flush=True)
        sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    dead = subprocess.run([*script, "killed"], cwd=ROOT, timeout=120)
    assert dead.returncode == -signal.SIGKILL
    (left,) = hidden(tmp_path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*script, "waiting"], cwd=ROOT, text=True, **pipes) as living:
        assert living.stdin is not None and living.stdout is not None
        assert living.stdout.readline() == "ready\n"
        (written,) = hidden(tmp_path)
        assert written != left, "the next process to write here has removed what the killed one left"
        sweep(tmp_path)
        assert hidden(tmp_path) == [written]
        living.stdin.close()
        assert living.wait(timeout=60) == 0
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_bytes() == b"half"


def test_only_staging_folders_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".fastmaf-notes.tmp").write_text("a file of the user")
    (tmp_path / ".fastmaf-drafts").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".fastmaf-0123456789abcdef.tmp").symlink_to(tmp_path / "elsewhere")
    before = sorted(os.listdir(tmp_path))
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_nothing_is_swept_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_lock", lambda file: False)
    with staging(tmp_path) as other:
        (other / "a.txt").write_text("another process writes this")
        sweep(tmp_path)
        assert (other / "a.txt").exists()
    assert os.listdir(tmp_path) == []


def test_a_staging_folder_that_is_taken_for_a_leftover_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making the folder and locking it, another process may sweep."""
    lock, swept = locks.try_lock, list[Path]()

    def late(path: Path) -> locks.FileLock | None:
        if not swept:
            swept.append(path)
            monkeypatch.setattr(atomic, "try_lock", lock)
            sweep(tmp_path)
            assert os.listdir(tmp_path) == []
        return lock(path)

    sweep(tmp_path)
    monkeypatch.setattr(atomic, "_swept", {os.path.realpath(tmp_path)})
    monkeypatch.setattr(atomic, "try_lock", late)
    write(tmp_path / "a.txt", b"1")
    assert swept and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
@pytest.mark.parametrize("links", [True, False])
def test_the_previous_content_is_kept_while_the_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refused(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "a.txt"
    write(path, b"old")
    keep_previous(path)
    assert path.read_bytes() == b"old"
    write(path, b"new")
    assert (path.read_bytes(), (tmp_path / "a.previous.txt").read_bytes()) == (b"new", b"old")
    keep_previous(tmp_path / "missing.txt")
    (tmp_path / "link.txt").symlink_to(path)
    keep_previous(tmp_path / "link.txt")
    write(tmp_path / "link.txt", b"newer")
    assert (tmp_path / "link.previous.txt").read_bytes() == b"new"
    for name in ("link.txt", "link.previous.txt"):
        (tmp_path / name).unlink()
    assert sorted(os.listdir(tmp_path)) == ["a.previous.txt", "a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_a_link_stays_and_what_it_points_at_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for name, new in (("a.txt", b"new"), ("a.safetensors", None)):
        target, link = tmp_path / "store" / name, tmp_path / name
        target.write_bytes(b"old")
        link.symlink_to(target)
        if new is None:
            write_tensors({"a": torch.ones(2)}, link, {})
            assert read_tensors(target)[0]["a"].tolist() == [1.0, 1.0]
        else:
            write(link, new)
            assert target.read_bytes() == new
        assert link.is_symlink()
    assert hidden(tmp_path) == hidden(tmp_path / "store") == []


def test_errors_name_the_file_and_not_its_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    monkeypatch.setattr(os, "replace", full)
    for name, put in (
        ("a.txt", lambda path: write(path, b"1")),
        ("a.safetensors", lambda path: write_tensors({}, path, {})),
    ):
        with pytest.raises(OSError) as caught:
            put(tmp_path / name)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / name))
    with pytest.raises(FileNotFoundError) as missing, written_atomically(tmp_path / "b.txt"):
        (tmp_path / "another").read_bytes()
    assert missing.value.filename == str(tmp_path / "another")
    with (
        pytest.raises(OSError, match="b.txt: cannot be written: encoder error"),
        written_atomically(tmp_path / "b.txt"),
    ):
        raise OSError("encoder error")
