"""FIFOs, devices, folders and broken links with the name of an image: errors, or ignored in a folder; never opened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastmaf.images.dataset import load_train
from fastmaf.images.decode import DataError, Frame, load_image
from tests.images.pictures import picture
from tests.inspection.workflow.expanded import expand, read_all

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with FIFOs")

ODD = {
    "fifo.png": "a FIFO",
    "folder.png": "a folder",
    "zero.png": "a character device",
    "dangling.png": "a link to 'nowhere', which does not exist",
    "loop.png": "a link in a loop",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, and something of each other kind under an image's name."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", (1, 2, 3))
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    for name, to in (("zero.png", "/dev/zero"), ("dangling.png", "nowhere"), ("loop.png", "loop.png")):
        (tmp_path / name).symlink_to(to)
    return tmp_path


@pytest.mark.parametrize("name", ODD)
def test_a_named_path_that_is_no_regular_file_is_an_error(folder: Path, name: str) -> None:
    with pytest.raises(DataError) as error:
        load_image(folder / name, 4)
    assert str(error.value).startswith(f"{folder / name}: expected a regular file, found {ODD[name]}")


def test_in_a_folder_they_are_left_aside_and_counted(folder: Path) -> None:
    images = load_train(folder, size=8, progress=False)
    assert [path.name for path in images.paths] == ["a.png", "b.png"]
    note = "3 paths skipped: named like images, but not regular files (dangling.png is a link to 'nowhere', "
    assert any(text.startswith(note) for text in images.notes)
    assert any(text.startswith("1 link out of the folder skipped") for text in images.notes)  # to /dev/zero
    inputs = expand([folder])
    assert [path.name for path in inputs.files] == ["a.png", "b.png"]
    assert any(text.startswith(note) for text in inputs.notes)


def test_in_a_list_of_files_they_are_named(folder: Path) -> None:
    names = ["a.png", "fifo.png", "zero.png", "loop.png"]
    frame, *messages = read_all([folder / name for name in names], 8)
    assert isinstance(frame, Frame)
    for name, message in zip(names[1:], messages, strict=True):
        assert isinstance(message, str) and ODD[name] in message


@pytest.mark.slow
def test_a_pipe_on_standard_input_is_no_image() -> None:
    code = "from fastmaf.images.decode import load_image; load_image('/dev/stdin', 4)"
    run = subprocess.run([sys.executable, "-c", code], input="x", capture_output=True, text=True, timeout=600)
    assert run.returncode == 1 and "/dev/stdin: expected a regular file, found a FIFO" in run.stderr
