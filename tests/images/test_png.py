"""Images written as PNG files, alone and in a grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmaf.images.png import save_grid, save_png


def test_grid_holds_every_pixel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    save_grid(tmp_path / "g.png", images, columns=3, scale=5)
    picture = np.asarray(Image.open(tmp_path / "g.png").convert("RGB"))
    assert picture.shape == (6 + 2 * (20 + 6), 6 + 3 * (30 + 6), 3)
    for i, image in enumerate(images):
        top, left = 6 + i // 3 * 26, 6 + i % 3 * 36
        cell = picture[top : top + 20, left : left + 30]
        np.testing.assert_array_equal(cell, image.repeat(5, 0).repeat(5, 1))
    assert (picture[32:52, 78:] == 255).all()  # the sixth cell is empty


@pytest.mark.parametrize(("n", "shape"), [(1, (1, 1)), (5, (1, 5)), (30, (5, 6))])
def test_grid_default_layout(tmp_path: Path, n: int, shape: tuple[int, int]) -> None:
    images = np.zeros((n, 64, 64, 3), np.uint8)
    save_grid(tmp_path / "g.png", images)
    width, height = Image.open(tmp_path / "g.png").size
    assert (height // 192, width // 192) == shape


def test_grid_and_image_refuse(tmp_path: Path) -> None:
    good = np.zeros((2, 4, 4, 3), np.uint8)
    for bad in (good.astype(np.float32), good[0], good[..., :1], good[:0]):
        with pytest.raises(ValueError, match="uint8"):
            save_grid(tmp_path / "g.png", bad)
    with pytest.raises(ValueError, match="columns=0"):
        save_grid(tmp_path / "g.png", good, columns=0)
    with pytest.raises(ValueError, match="uint8"):
        save_png(tmp_path / "i.png", good)
    assert not list(tmp_path.iterdir())


def test_save_png_is_exact(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    save_png(tmp_path / "sub" / "ä 1.png", image[:, ::-1])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sub" / "ä 1.png")), image[:, ::-1])
