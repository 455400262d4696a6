"""Marks of the pictures that fastmaf writes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastmaf.images.png import save_grid, save_png
from fastmaf.io.marks import KEYWORD, MAP, SAMPLE, is_output, role_of
from tests.images.pictures import picture


def test_marks_are_read_from_headers_alone(tmp_path: Path) -> None:
    save_png(tmp_path / "sample.png", np.zeros((4, 4, 3), np.uint8))
    save_grid(tmp_path / "grid.png", np.zeros((2, 4, 4, 3), np.uint8))
    text = PngInfo()
    text.add_text("Comment", "x" * 10_000)
    text.add_text(KEYWORD, SAMPLE)
    Image.new("L", (4, 4)).save(tmp_path / "late.png", pnginfo=text)
    for name in ("sample.png", "grid.png", "late.png"):
        assert is_output(tmp_path / name), name
    assert role_of(tmp_path / "late.png") == SAMPLE
    for size in range(60):  # cut anywhere
        (tmp_path / "cut.png").write_bytes((tmp_path / "sample.png").read_bytes()[:size])
        assert role_of(tmp_path / "cut.png") in (None, SAMPLE)


def test_maps_of_versions_without_marks_are_known(tmp_path: Path) -> None:
    text = PngInfo()
    text.add_text("Scale", "512.0")
    text.add_text("Description", "anomaly map: value = level / 512.0")
    Image.new("I;16", (4, 4)).save(tmp_path / "map.png", pnginfo=text)
    Image.new("F", (4, 4)).save(tmp_path / "map.tiff", tiffinfo={270: "anomaly map, times"})
    assert role_of(tmp_path / "map.png") == role_of(tmp_path / "map.tiff") == MAP


def test_other_files_have_no_role(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    Image.new("F", (4, 4)).save(tmp_path / "a.tiff", tiffinfo={270: "a camera"})
    (tmp_path / "b.tiff").write_bytes(b"II*\0\xff\xff\xff\xff")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    for file in tmp_path.iterdir():
        assert role_of(file) is None, file
    assert role_of(tmp_path / "nowhere.png") is None
