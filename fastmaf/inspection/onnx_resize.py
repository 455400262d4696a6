"""Pillow's bilinear resizing with antialiasing in ONNX's operators, bit for bit.

ONNX Runtime's own ``Resize(antialias=1)`` is not the same: with ``exclude_outside=1`` a value is off by one grey level
here and there (its weights come from a float32 scale), without it by up to 29 at the edges. So Pillow's arithmetic is
written out: triangle weights rounded to 22 bits, one pass an axis, each rounded to 8 bits. Products and sums are
integers below 2^53, which float64 holds exactly, in whatever order a runtime adds them.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from fastmaf.inspection.onnx_values import Value

_ONE = float(1 << 22)  # Pillow's PRECISION_BITS for 8-bit images: 32 - 8 - 2


def resized(image: Value, size: int) -> Value:
    """uint8 ``[h, w, 3]``, any h and w -> float64 ``[3, size, size]``, whole numbers from 0 to 255.

    Args:
        image: R, G, B.
        size: of the square, in pixels.
    """
    planes = image.transpose(2, 0, 1).cast("float64")
    shape = image.op("Shape", dtype="int64")
    height, width = shape.take(0, axis=0), shape.take(1, axis=0)
    down, across = _weights(height, size), _weights(width, size).transpose(1, 0)

    def horizontal_first() -> Value:
        return _rounded(down @ _rounded(planes @ across))

    def vertical_first() -> Value:
        return _rounded(_rounded(down @ planes) @ across)

    if not pillow_turns_tall_images():
        return horizontal_first()
    # Where h <= size, Pillow keeps the horizontal pass first whatever the width.
    tall = (height.op("Max", size) > size).op("And", height + size > width * 2)
    return image.graph.either(tall, vertical_first, horizontal_first)


def _weights(length: Value, size: int) -> Value:
    """Returns ``[size, length]``: how much each pixel of an axis counts for each new one, in units of 2^-22."""
    scale = length.cast("float64") / size
    widening = scale.op("Max", 1.0)  # a smaller image takes a wider triangle: the antialiasing
    centre = scale * (np.arange(size)[:, None] + 0.5)
    pixels = length.graph.value(0, "int64").op("Range", length, 1).cast("float64")
    distance = (pixels - centre + 0.5) * (widening.graph.value(1.0, "float64") / widening)
    triangle = (-distance.op("Abs") + 1.0).op("Max", 0.0)
    return (triangle / triangle.sum(1, keep=True) * _ONE + 0.5).op("Floor")


def _rounded(total: Value) -> Value:
    return ((total + _ONE / 2) / _ONE).op("Floor").op("Clip", 0.0, 255.0)


def pillow_turns_tall_images() -> bool:
    """Whether the Pillow at hand, as 13.0 does, begins with the vertical pass where h > size and 2w < h + size.

    Earlier ones begin with the horizontal pass always. As each pass rounds to 8 bits, the order shows.
    """
    noise = np.random.default_rng(0).integers(0, 256, (60, 20, 3), dtype=np.uint8)
    image, bilinear = Image.fromarray(noise), Image.Resampling.BILINEAR
    return (
        image.resize((16, 16), bilinear).tobytes()
        == image.resize((20, 16), bilinear).resize((16, 16), bilinear).tobytes()
    )
