"""Which files a command may replace, and by what it knows its own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fastmaf.io import outputs
from fastmaf.io.outputs import Kind, Output, OutputError, check_outputs

FREE = Kind("anything", lambda _: True)


def check(*paths: Path, inputs: tuple[Path, ...] = ()) -> None:
    check_outputs([Output(path, FREE) for path in paths], inputs)


@pytest.mark.parametrize("spelling", ["a/x", "a/../a/x", "./a//x", "link/x", "a/back/a/x"])
def test_a_place_is_known_in_every_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "a" / "back").symlink_to("..")
    with pytest.raises(OutputError, match="which this command writes, too"):
        check(tmp_path / "a" / "x", Path(spelling))
    (tmp_path / "a" / "x").touch()
    with pytest.raises(OutputError, match="is to be read"):
        check(Path(spelling), inputs=(tmp_path / "a" / "x",))
    check(tmp_path / "a" / "y", inputs=(tmp_path / "a" / "x",))


def test_a_link_to_an_input_is_that_input(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    (tmp_path / "out").symlink_to(tmp_path / "image")
    with pytest.raises(OutputError, match="is to be read"):
        check(tmp_path / "out", inputs=(tmp_path / "image",))
    os.link(tmp_path / "image", tmp_path / "hard")  # replacing this name leaves the other
    check(tmp_path / "hard", inputs=(tmp_path / "image",))


def test_case_counts_where_the_file_system_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_folds_case", lambda folder: False)
    check(tmp_path / "Heat" / "a.png", tmp_path / "heat" / "a.png", tmp_path / "A", tmp_path / "a")
    monkeypatch.setattr(outputs, "_folds_case", lambda folder: True)
    for path, other in (("Heat/a.png", "heat/A.png"), ("A", "a")):
        with pytest.raises(OutputError):
            check(tmp_path / path, tmp_path / other)


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name, words in (("pipe", "a pipe"), ("folder", "is a folder")):
        with pytest.raises(OutputError, match=words):
            check(tmp_path / name)
    with pytest.raises(NotADirectoryError):
        check(tmp_path / "file" / "x")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(PermissionError) as caught:
        check(tmp_path / "new" / "x")
    assert caught.value.filename == str(tmp_path)
