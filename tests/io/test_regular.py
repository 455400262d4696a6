"""Only regular files are opened, and nothing else is waited for."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastmaf.io import regular
from fastmaf.io.regular import NotRegularError, is_regular, kind_of, open_regular

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with FIFOs")


@pytest.fixture
def other_kinds(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """One path of each kind of file that is not regular, by its name in messages."""
    os.mkfifo(fifo := tmp_path / "fifo.png")
    (folder := tmp_path / "folder.png").mkdir()
    (to_fifo := tmp_path / "to-fifo.png").symlink_to(fifo)
    (dangling := tmp_path / "dangling.png").symlink_to("nowhere.png")
    (loop := tmp_path / "loop.png").symlink_to(loop.name)
    server = socket.socket(socket.AF_UNIX)
    before = Path.cwd()
    os.chdir(tmp_path)  # a socket's name may be short only
    try:
        server.bind("socket.png")
    finally:
        os.chdir(before)
    yield {
        "a FIFO": fifo,
        "a FIFO (": to_fifo,
        "a folder": folder,
        "a socket": tmp_path / "socket.png",
        "a character device": Path("/dev/zero"),
        "a link to 'nowhere.png', which does not exist": dangling,
        "a link in a loop of links": loop,
    }
    server.close()


def test_a_regular_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    for path in (tmp_path / "a", str(tmp_path / "link")):
        assert kind_of(path) == "a regular file" and is_regular(path)
        with open_regular(path) as file:
            assert file.read() == b"content" and file.fileno() >= 0


def test_everything_else_is_named(other_kinds: dict[str, Path]) -> None:
    for words, path in other_kinds.items():
        assert not is_regular(path) and kind_of(path).startswith(words)
        with pytest.raises(NotRegularError) as error:
            open_regular(path)
        assert str(error.value).startswith(f"{path}: expected a regular file, found {words}")


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "none", ""):
        assert not is_regular(path)
        with pytest.raises(FileNotFoundError):
            open_regular(path)
    assert not is_regular("a\0b")


def test_a_path_that_is_replaced_between_check_and_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO that replaces the file after the first check is refused without blocking."""
    (path := tmp_path / "a.png").write_bytes(b"content")

    def replace(_: object) -> None:
        path.unlink()
        os.mkfifo(path)

    monkeypatch.setattr(regular, "_kind_at", replace)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            open_regular(path)
        except NotRegularError as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)  # a blocked opening would hang the tests
    thread.start()
    thread.join(60)
    assert errors and "a FIFO" in str(errors[0])
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
