"""Writing images as PNG files: one image, or many in a grid. Every file carries the mark of its role."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastmaf.io.atomic import written_atomically
from fastmaf.io.marks import GRID, KEYWORD, SAMPLE

_GAP = 6  # pixels between the images of a grid


def png_text(role: str) -> PngInfo:
    """Returns the text chunk that marks a picture with its role; see ``fastmaf.io.marks``."""
    text = PngInfo()
    text.add_text(KEYWORD, role)
    return text


def save_png(path: str | Path, image: np.ndarray, *, role: str = SAMPLE) -> None:
    """Writes one image, uint8 [h, w, 3], marked with a role."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"an image must be uint8 [h, w, 3], found {image.dtype} {list(image.shape)}")
    with written_atomically(path) as file:
        Image.fromarray(np.ascontiguousarray(image)).save(file, format="PNG", pnginfo=png_text(role))


def save_grid(path: str | Path, images: np.ndarray, *, columns: int | None = None, scale: int | None = None) -> None:
    """Writes many images into one picture, row by row, each pixel enlarged to a square of scale x scale.

    Args:
        path: the PNG to write.
        images: uint8 [n, h, w, 3].
        columns: images in a row; by default all of up to six, else a near-square grid.
        scale: enlargement; by default images become about 192 pixels wide, less in large grids.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        raise ValueError(f"images must be uint8 [n, h, w, 3] with n >= 1, found {images.dtype} {list(images.shape)}")
    if any(option is not None and option < 1 for option in (columns, scale)):
        raise ValueError(f"columns and scale must be at least 1, found columns={columns}, scale={scale}")
    n, height, width, _ = images.shape
    columns = min(n, columns or (n if n <= 6 else math.ceil(math.sqrt(n))))
    scale = scale or max(1, round(min(192, 2400 / columns) / width))
    h, w = height * scale, width * scale
    canvas = np.full((_GAP + math.ceil(n / columns) * (h + _GAP), _GAP + columns * (w + _GAP), 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = _GAP + (i // columns) * (h + _GAP), _GAP + (i % columns) * (w + _GAP)
        canvas[top : top + h, left : left + w] = image.repeat(scale, 0).repeat(scale, 1)
    save_png(path, canvas, role=GRID)
