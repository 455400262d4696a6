"""The imprint of a synthetic capsule: text as a texture that is laid around the capsule."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

TEXELS = 5  # texels per unit of length


@functools.lru_cache(maxsize=8)
def imprint(text: str, height: float = 15.0, bold: float = 1.5) -> np.ndarray:
    """Draws the imprint laid flat: float32 coverage (0..1), TEXELS per unit, with margins of 4 units."""
    font = ImageFont.load_default(size=height * TEXELS * 1.38)
    stroke = round(bold * TEXELS / 2)
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    gap = round(1.6 * TEXELS)
    boxes = [pen.textbbox((0, 0), letter, font=font, stroke_width=stroke) for letter in text]
    margin = 4 * TEXELS
    wide = sum(int(b[2] - b[0]) for b in boxes) + gap * (len(text) - 1) + 2 * margin
    tall = max(int(b[3] - b[1]) for b in boxes) + 2 * margin
    image = Image.new("L", (wide, tall))
    pen = ImageDraw.Draw(image)
    x = margin
    for letter, box in zip(text, boxes, strict=True):
        pen.text((x - box[0], margin - box[1]), letter, fill=255, font=font, stroke_width=stroke)
        x += int(box[2] - box[0]) + gap
    flat = np.asarray(image.filter(ImageFilter.GaussianBlur(0.3 * TEXELS)), dtype=np.float32) / 255.0
    flat.setflags(write=False)
    return flat


def sample(texture: np.ndarray, along: np.ndarray, around: np.ndarray) -> np.ndarray:
    """Samples a texture at these distances from its centre, in units; 0 outside it."""
    tall, wide = texture.shape
    column = np.rint(along * TEXELS + wide / 2).astype(np.int32)
    row = np.rint(around * TEXELS + tall / 2).astype(np.int32)
    inside = (column >= 0) & (column < wide) & (row >= 0) & (row < tall)
    values = np.zeros(along.shape, dtype=np.float32)
    values[inside] = texture[row[inside], column[inside]]
    return values
