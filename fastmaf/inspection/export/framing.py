"""A frame for images of different shapes in ONNX's operators; see ``fastmaf.inspection.letterbox``."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastmaf.inspection.export.graph_builder import Value
from fastmaf.inspection.export.resize import counted, reduced_squares
from fastmaf.inspection.letterbox import Letterbox


class Side(NamedTuple):
    """Where images lie along a side of the frame: first pixel and number of pixels, int64 scalars."""

    first: Value
    length: Value


def extent_of(box: Letterbox, image: Value, size: int) -> tuple[Side, Side]:
    """Returns where images ``[n, h, w, 3]`` lie in the frame, down and across; see ``Letterbox.extent``."""
    shape = image.op("Shape", dtype="int64")
    height, width = (shape.take(axis, axis=0).cast("float64") for axis in (1, 2))
    whole = image.graph.value(float(box.height), "float64"), image.graph.value(float(box.width), "float64")
    scale = (whole[0] / height).op("Min", whole[1] / width)
    scale = scale if box.enlarges else scale.op("Min", 1.0)
    down, across = (
        (side * float(size) * scale / of_frame).op("Round").op("Clip", 1.0, float(size)).cast("int64")
        for side, of_frame in zip((height, width), whole, strict=True)
    )
    return _side(down, size), _side(across, size)


def _side(length: Value, size: int) -> Side:
    return Side((-length + float(size)) / 2.0, length)  # whole numbers: the quotient is rounded down


def framed(planes: Value, extent: tuple[Side, Side], size: int) -> Value:
    """Returns images, float64 ``[n, 3, size, size]``, in their frame, as ``letterboxed`` does."""
    laid = reduced_squares(planes, size, *(side.length for side in extent))
    for axis, side in zip((2, 3), extent, strict=True):
        at = (planes.graph.value(np.arange(size), "int64") - side.first).op("Max", 0).op("Min", side.length - 1.0)
        laid = laid.op("Gather", at, axis=axis)
    return laid


def maps_of_images(maps: Value, extent: tuple[Side, Side], size: int) -> Value:
    """Returns maps, float32 ``[n, size, size]``, of images without their frame, as the function of this name does."""
    down, across = (_enlarging(side, size) for side in extent)
    return down @ maps @ across.transpose(1, 0)


def _enlarging(side: Side, size: int) -> Value:
    """Returns the matrix that enlarges the image's part of the columns of a map to all, float32 ``[size, size]``."""
    length = side.length.cast("float64")
    place = length * ((np.arange(size)[:, None] + 0.5) / size) - 0.5
    place = place.op("Max", 0.0).op("Min", length - 1.0) + side.first.cast("float64")
    pixels = counted(side.first.graph.value(size, "int64")).cast("float64")
    return (-(pixels - place).op("Abs") + 1.0).op("Max", 0.0).cast("float32")
