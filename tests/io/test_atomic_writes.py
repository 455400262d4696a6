"""Writes that fail: the error names the file, and nothing half-written stays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastmaf
from fastmaf.cli.output import error_text
from fastmaf.images.png import save_grid, save_png
from fastmaf.inspection.map_images import write_map, write_overlay
from fastmaf.io.atomic import written_atomically
from fastmaf.metrics import plots

resource = pytest.importorskip("resource")


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Files that grow beyond this size fail, as on a full disk but with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)

WRITERS: dict[str, Callable[[Path], object]] = {
    "model.safetensors": lambda path: fastmaf.MAF(48, 1, (64,), seed=0).save(path),
    "a.bin": lambda path: _bytes(path),
    "curve.png": lambda path: plots.nll_curve(path, [{"epoch": 1, "nll": 0.0}]),
    "grid.png": lambda path: save_grid(path, NOISE[None]),
    "sample.png": lambda path: save_png(path, NOISE),
    "overlay.png": lambda path: write_overlay(path, NOISE, np.ones((64, 64), np.float32), 0, 1, score=2, threshold=1),
    "map.png": lambda path: write_map(path, np.random.default_rng(0).random((64, 64)).astype(np.float32) * 100),
    "map.tiff": lambda path: write_map(path, np.random.default_rng(0).random((64, 64)).astype(np.float32)),
}


def _bytes(path: Path) -> None:
    with written_atomically(path) as file:
        file.write(bytes(10_000))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes are not signals everywhere")
@pytest.mark.parametrize("name", WRITERS)
def test_a_write_without_room_names_the_file_and_leaves_the_old_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_bytes(b"old")
    with small_files(2000), pytest.raises(OSError) as caught:
        WRITERS[name](path)
    assert error_text(caught.value) == f"{path}: file too large"
    assert [file.name for file in path.parent.iterdir()] == [name] and path.read_bytes() == b"old"


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for write in (_bytes, WRITERS["model.safetensors"]):
        with pytest.raises(OSError) as caught:
            write(tmp_path / "file" / "m.safetensors")
        assert str(tmp_path / "file") in error_text(caught.value)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_name_as_long_as_may_be_can_be_written_and_a_longer_one_is_named(tmp_path: Path) -> None:
    _bytes(tmp_path / ("n" * 255))
    with pytest.raises(OSError) as caught:
        _bytes(tmp_path / ("n" * 256))
    assert error_text(caught.value) == f"{tmp_path / ('n' * 256)}: file name too long"


def test_pictures_are_whole(tmp_path: Path) -> None:
    for name in ("sample.png", "map.tiff", "overlay.png"):
        WRITERS[name](tmp_path / name)
        with Image.open(tmp_path / name) as image:
            image.load()
