"""The pose of an image in ONNX's operators: its angle and middle, the turned image, and the map turned back.

What decides on the angle is computed in float64 as in ``fastmaf.inspection.pose``, as the result is rounded. ONNX has a
``GridSample`` for float32 only below opset 20, which the turned images and maps are computed in, too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import affine_grid

from fastmaf.inspection.export.graph_builder import Value
from fastmaf.inspection.export.resize import resized
from fastmaf.inspection.pose import (
    ANGLES,
    FLAT,
    LIGHT,
    RADII,
    ROUNDING,
    SIDE,
    STEPS,
    TINY,
    Pose,
    pixel_centres,
    polar_grid,
)


class Place(NamedTuple):
    """Cosine and sine of the angle of an object, and its middle, float64 ``[n, 1]`` each; see ``Pose.places``."""

    cos: Value
    sin: Value
    right: Value
    below: Value


def grey(planes: Value) -> Value:
    """Returns ``to_grey`` of whole numbers, float64 ``[n, 3, h, w]``, as ``[n, h, w]``."""
    weights = np.array([19595.0, 38470.0, 7471.0]).reshape(3, 1, 1)  # exact in float64
    return (((planes * weights).sum(1) + 32768.0) / 65536.0).op("Floor")


def place_of(pose: Pose, planes: Value, size: int) -> Place:
    """Returns where the objects of images, float64 ``[n, 3, size, size]``, lie."""
    side = min(SIDE, size)
    small = grey(planes if side == size else resized(planes.transpose(0, 2, 3, 1), side))
    pixels = small.reshape(0, side * side)
    nothing = pixels.sum(1, keep=True) * 0.0  # of the batch's length
    right, below = _middle(small, side) if pose.moves else (nothing, nothing)
    polar = _polar(pixels, right, below, side)
    # Row a, column b: the product of the image at angle a and the reference at angle b.
    products = (polar.reshape(0, ANGLES, RADII) @ pose.reference.T).reshape(0, ANGLES**2)
    angle = np.arange(ANGLES)
    shifted = (angle[:, None] + angle) % ANGLES * ANGLES + angle  # row k: of the image turned by k
    correlation = products.take(shifted.reshape(-1), axis=1).reshape(0, ANGLES, ANGLES).sum(2)
    best = correlation.op("ArgMax", axis=1, keepdims=1, dtype="int64")
    left, peak, after = (
        correlation.op("GatherElements", (best + float(ANGLES + k)).op("Mod", float(ANGLES)), axis=1)
        for k in (-1, 0, 1)
    )
    bend = (peak * 2.0 - left - after).op("Max", TINY)
    vertex = best.cast("float64") + ((after - left) / (bend * 2.0)).op("Clip", -0.5, 0.5)
    flat = polar.op("Abs").op("ReduceMax", planes.graph.value(np.array([1]), "int64"), keepdims=1)
    turn = (vertex * STEPS).op("Round") * (2 * np.pi / (STEPS * ANGLES)) * (flat > FLAT).cast("float64")
    return Place(turn.op("Cos"), turn.op("Sin"), right, below)


def turned(planes: Value, place: Place, size: int) -> Value:
    """Returns images, float64 ``[n, 3, size, size]``, turned as ``fastmaf.inspection.pose.turned`` does."""
    x = planes.cast("float32")
    ground = _border_median(x, size).reshape(0, 3, 1, 1)
    rows = _row(place.cos, -place.sin, place.right), _row(place.sin, place.cos, place.below)
    return (_sampled(x - ground, rows, size) + ground).op("Round").op("Clip", 0.0, 255.0).cast("float64")


def maps_turned_back(maps: Value, place: Place, size: int) -> Value:
    """Returns maps, float32 ``[n, size, size]``, turned back as ``fastmaf.inspection.pose.maps_turned_back`` does."""
    cos, sin, right, below = place
    # The inverse of a rotation, then a shift.
    rows = _row(cos, sin, -(cos * right + sin * below)), _row(-sin, cos, sin * right - cos * below)
    return _sampled(maps.reshape(0, 1, size, size), rows, size).reshape(0, size, size)


def _row(*entries: Value) -> Value:
    """Returns a row of affine maps, float32 ``[n, 3]``."""
    return entries[0].op("Concat", *entries[1:], axis=1).cast("float32")


def _sampled(x: Value, rows: tuple[Value, Value], size: int) -> Value:
    """Returns ``[n, c, size, size]`` seen through affine maps of two rows, 0 outside."""
    plain = affine_grid(torch.eye(2, 3)[None], [1, 1, size, size], align_corners=False).view(-1, 2)
    base = x.graph.value(torch.cat([plain, torch.ones(len(plain), 1)], dim=1).T, "float32")
    right, below = ((row @ base).reshape(0, size, size, 1) for row in rows)
    grid = right.op("Concat", below, axis=3)
    return x.op("GridSample", grid, mode="bilinear", padding_mode="zeros", align_corners=0)


def _border_median(x: Value, side: int) -> Value:
    """Returns the median along the border of planes ``[..., side, side]``, the lower one of two as in torch."""
    first, last = x.graph.value(0, "int64"), x.graph.value(side - 1, "int64")
    edges = [x.op("Gather", end, axis=axis) for axis in (-1, -2) for end in (first, last)]
    border = edges[0].op("Concat", *edges[1:], axis=-1)
    half = (4 * side - 1) // 2 + 1
    lower = border.op("TopK", x.graph.value(np.array([half]), "int64"), largest=0, outputs=2)
    return lower.op("Gather", x.graph.value(half - 1, "int64"), axis=-1)


def _middle(small: Value, side: int) -> tuple[Value, Value]:
    """Returns the middle of the object in grey images, float64 ``[n, side, side]``, right and below, ``[n, 1]``."""
    graph = small.graph
    difference = (small - _border_median(small, side).reshape(0, 1, 1)).op("Abs")
    largest = difference.op("ReduceMax", graph.value(np.array([1, 2]), "int64"), keepdims=1)
    weight = (difference - largest * LIGHT).op("Max", 0.0)
    of_columns, of_rows = weight.sum(1), weight.sum(2)
    total = of_columns.sum(1, keep=True).op("Max", TINY)
    at = pixel_centres(side)[:, None]
    right, below = ((sums @ at / total * ROUNDING).op("Round") / ROUNDING for sums in (of_columns, of_rows))
    return right, below


def _polar(pixels: Value, right: Value, below: Value, side: int) -> Value:
    """Returns polar images about the middles, float64 ``[n, ANGLES * RADII]``, less their means."""
    across, down = polar_grid().view(-1, 2).unbind(-1)
    columns, rows = (
        (((of_grid + 1.0 + middle) * side - 1.0) / 2.0).op("Clip", 0.0, side - 1.0)
        for middle, of_grid in (
            (right, pixels.graph.value(across, "float64")),
            (below, pixels.graph.value(down, "float64")),
        )
    )
    column, row = columns.op("Floor"), rows.op("Floor")
    next_column, next_row = ((at + 1.0).op("Min", side - 1.0) for at in (column, row))
    u, v = columns - column, rows - row

    def at(row: Value, column: Value) -> Value:
        return pixels.op("GatherElements", (row * float(side) + column).cast("int64"), axis=1)

    above = at(row, column) * (-u + 1.0) + at(row, next_column) * u
    under = at(next_row, column) * (-u + 1.0) + at(next_row, next_column) * u
    polar = above * (-v + 1.0) + under * v
    return polar - polar.sum(1, keep=True) / float(ANGLES * RADII)
