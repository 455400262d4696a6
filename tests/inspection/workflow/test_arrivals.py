"""Which files of a watched folder are read, and when."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmaf.images.png import save_png
from fastmaf.images.read_ahead import Stamp, stamp_of
from fastmaf.inspection.workflow.arrivals import Arrivals
from fastmaf.io.marks import OVERLAY


class Watched:
    """A folder with a clock of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, 100.0
        self.scored: dict[str, Stamp] = {}
        self.arrivals = Arrivals(folder, self.scored, lambda: self.now)

    def write(self, name: str, content: bytes = b"one", changed: int = 1) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(0, changed * 10**9))
        return path

    def ready(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in self.arrivals.ready()]

    def score(self, name: str) -> None:
        self.scored[str(self.folder / name)] = stamp_of(self.folder / name)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_a_file_is_read_once_it_stays_the_same(watched: Watched) -> None:
    watched.write("a.png")
    assert watched.ready() == []
    watched.write("a.png", b"longer")
    assert watched.ready() == [], "it has grown"
    watched.write("a.png", b"longer", changed=2)
    assert watched.ready() == [], "it was changed"
    assert watched.ready() == ["a.png"]
    watched.score("a.png")
    assert watched.ready() == []


def test_files_come_in_the_order_of_their_last_change(watched: Watched) -> None:
    for name, changed in (("a.png", 3), ("below/b.JPG", 1), ("c.tiff", 2), ("d.png", 2)):
        watched.write(name, changed=changed)
    watched.ready()
    assert watched.ready() == ["below/b.JPG", "c.tiff", "d.png", "a.png"]


def test_other_files_are_left_alone(watched: Watched) -> None:
    for name in ("a.txt", ".hidden.png", "a.png.tmp", ".below/a.png"):
        watched.write(name)
    (watched.folder / "folder.png").mkdir()
    (watched.folder / "broken.png").symlink_to(watched.folder / "nowhere")
    save_png(watched.folder / "overlay.png", np.zeros((4, 4, 3), np.uint8), role=OVERLAY)
    if hasattr(os, "mkfifo"):
        os.mkfifo(watched.folder / "pipe.png")
    Image.new("L", (4, 4)).save(watched.folder / "real.png")
    watched.ready()
    assert watched.ready() == ["real.png"]


def test_what_cannot_be_read_is_tried_again_when_it_has_changed_and_given_up_at_last(watched: Watched) -> None:
    path = watched.write("a.png")
    watched.ready()
    assert watched.ready() == ["a.png"] and not watched.arrivals.refuse(path)
    watched.now += 9
    assert watched.ready() == [], "it is as it was"
    watched.write("a.png", b"more of it")
    assert watched.ready() == []
    assert watched.ready() == ["a.png"] and not watched.arrivals.refuse(path)
    watched.now += 9
    assert watched.ready() == []
    watched.now += 1
    assert watched.ready() == ["a.png"] and watched.arrivals.refuse(path), "for the last time"
    watched.now += 100
    assert watched.ready() == []
    watched.write("a.png", b"all of it", changed=5)
    watched.ready()
    assert watched.ready() == ["a.png"]


def test_a_file_that_was_scored_is_read_again_when_it_has_changed(watched: Watched) -> None:
    watched.write("a.png")
    watched.score("a.png")
    assert watched.ready() == watched.ready() == []
    watched.write("a.png", b"other", changed=2)
    watched.ready()
    assert watched.ready() == ["a.png"]


def test_a_folder_that_is_gone_is_empty(tmp_path: Path) -> None:
    assert Watched(tmp_path / "gone").ready() == []
