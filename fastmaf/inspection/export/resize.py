"""Pillow's bilinear resizing with antialiasing in ONNX's operators, bit for bit.

ONNX Runtime's own ``Resize(antialias=1)`` differs: with ``exclude_outside=1`` some values are off by one grey level
(its weights come from a float32 scale), without it by up to 29 at the edges. So Pillow's arithmetic is reproduced:
triangle weights rounded to 22 bits, one pass per axis, each rounded to 8 bits. Products and sums are integers below
2^53, which float64 represents exactly, in any order of summation.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from fastmaf.inspection.export.graph_builder import Value

_ONE = float(1 << 22)  # Pillow's PRECISION_BITS for 8-bit images: 32 - 8 - 2


def resized(image: Value, size: int | tuple[int, int]) -> Value:
    """Resizes 8-bit values ``[n, h, w, 3]`` of any size to float64 ``[n, 3, size, size]``, whole numbers 0 to 255.

    Images of the same side along one axis may be resized to other shapes, ``[n, 3, *size]``.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    planes = image.transpose(0, 3, 1, 2).cast("float64")
    shape = image.op("Shape", dtype="int64")
    height, width = shape.take(1, axis=0), shape.take(2, axis=0)
    down, across = _weights(height, rows), _weights(width, columns).transpose(1, 0)

    def horizontal_first() -> Value:
        return _rounded(down @ _rounded(planes @ across))

    def vertical_first() -> Value:
        return _rounded(_rounded(down @ planes) @ across)

    if rows != columns or not pillow_resizes_tall_images_vertically_first():
        return horizontal_first()
    # If h <= rows, Pillow begins with the horizontal pass for any width.
    tall = (height.op("Max", rows) > rows).op("And", height + rows > width * 2)
    return image.graph.either(tall, vertical_first, horizontal_first)


def reduced_squares(planes: Value, size: int, rows: Value, columns: Value) -> Value:
    """Resizes squares, float64 ``[n, 3, size, size]``, to at most this many rows and columns, int64 scalars."""
    length = planes.graph.value(size, "int64")
    return _rounded(_weights(length, rows) @ _rounded(planes @ _weights(length, columns).transpose(1, 0)))


def counted(length: Value) -> Value:
    """Returns the numbers from 0 to before a length, an int64 scalar."""
    return length.graph.value(0, "int64").op("Range", length, 1)


def _weights(length: Value, size: int | Value) -> Value:
    """Returns the weights of an axis's pixels in each new pixel, ``[size, length]``, in units of 2^-22."""
    places: np.ndarray | Value
    if isinstance(size, Value):
        scale = length.cast("float64") / size.cast("float64")
        places = counted(size).cast("float64").reshape(-1, 1) + 0.5
    else:
        scale, places = length.cast("float64") / size, np.arange(size)[:, None] + 0.5
    widening = scale.op("Max", 1.0)  # antialiasing: a wider triangle for reduction
    centre = scale * places
    pixels = counted(length).cast("float64")
    distance = (pixels - centre + 0.5) * (widening.graph.value(1.0, "float64") / widening)
    triangle = (-distance.op("Abs") + 1.0).op("Max", 0.0)
    return (triangle / triangle.sum(1, keep=True) * _ONE + 0.5).op("Floor")


def _rounded(total: Value) -> Value:
    return ((total + _ONE / 2) / _ONE).op("Floor").op("Clip", 0.0, 255.0)


def pillow_resizes_tall_images_vertically_first() -> bool:
    """Returns whether the installed Pillow begins with the vertical pass if h > size and 2w < h + size, as 13.0 does.

    Earlier versions always begin with the horizontal pass. As each pass rounds to 8 bits, the order matters.
    """
    noise = np.random.default_rng(0).integers(0, 256, (60, 20, 3), dtype=np.uint8)
    image, bilinear = Image.fromarray(noise), Image.Resampling.BILINEAR
    return (
        image.resize((16, 16), bilinear).tobytes()
        == image.resize((20, 16), bilinear).resize((16, 16), bilinear).tobytes()
    )
