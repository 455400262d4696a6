"""Processing large images in strips, which bounds the memory of temporary copies."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

STRIP_PIXELS = 1 << 18


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yields (first row, copy of a strip) from the top, strips of one row or up to ``STRIP_PIXELS`` pixels."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def to_array(image: Image.Image) -> np.ndarray:
    """Converts an image of mode L or RGB to uint8 [h, w] or [h, w, 3]; ``np.array`` needs three times the memory."""
    shape = (image.height, image.width) if image.mode == "L" else (image.height, image.width, 3)
    values = np.empty(shape, dtype=np.uint8)
    for top, strip in strips(image):
        values[top : top + strip.height] = np.asarray(strip)
    return values
