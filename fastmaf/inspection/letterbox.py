"""A frame into which images of different shapes are laid undistorted; what they do not fill repeats their border."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmaf.images.reduce import reduced
from fastmaf.inspection.aspect import aspect_of
from fastmaf.inspection.map_shapes import squared


class Extent(NamedTuple):
    """Where an image lies in a square, in pixels."""

    top: int
    left: int
    rows: int
    columns: int


class Letterbox(NamedTuple):
    """A frame, in whose middle images are laid.

    The scale of an image of h x w pixels is that at which it just fits into the frame, min(H / h, W / w); at most 1
    unless smaller images are enlarged.

    Attributes:
        height, width: H and W in pixels of the images.
        enlarges: whether images that are smaller than the frame are enlarged. If not, all that fit have the same scale,
            as images of one camera that were cropped differently have.

    Example:
        >>> from fastmaf.inspection.letterbox import Letterbox
        >>> Letterbox(400, 400, True).extent((300, 400), 64)
        Extent(top=8, left=0, rows=48, columns=64)
    """

    height: int
    width: int
    enlarges: bool

    @property
    def aspect(self) -> float:
        """Height over width; 1 if it is close to square."""
        return aspect_of([(self.height, self.width)])

    def extent(self, shape: tuple[int, int], size: int) -> Extent:
        """Returns where an image of (height, width) lies in the frame, which is resized to a square of this size."""
        scale = min(self.height / shape[0], self.width / shape[1])
        scale = scale if self.enlarges else min(scale, 1.0)
        rows, columns = (
            min(max(round(size * side * scale / whole), 1), size)
            for side, whole in zip(shape, (self.height, self.width), strict=True)
        )
        return Extent((size - rows) // 2, (size - columns) // 2, rows, columns)


def letterboxed(pixels: Tensor, shapes: Sequence[tuple[int, int]], box: Letterbox) -> Tensor:
    """Returns images in their frame, resized to a square, uint8 ``[n, 3, s, s]``.

    Args:
        pixels: uint8 ``[n, 3, s, s]``, each resized from its own shape.
        shapes: (height, width) of each before it became square.
        box: the frame.
    """
    if not len(pixels):
        return pixels
    size = int(pixels.shape[-1])
    laid = []
    for image, shape in zip(pixels, shapes, strict=True):
        top, left, rows, columns = box.extent(shape, size)
        small, at = reduced(image[None], (rows, columns))[0], torch.arange(size, device=pixels.device)
        small = small.index_select(1, (at - top).clamp(0, rows - 1))
        laid.append(small.index_select(2, (at - left).clamp(0, columns - 1)))
    return torch.stack(laid)


def maps_of_images(maps: np.ndarray, shapes: Sequence[tuple[int, int]], box: Letterbox) -> np.ndarray:
    """Returns maps of framed images, float32 ``[n, s, s]``, as those of the images alone, each resized to a square."""
    result = np.empty_like(maps)
    for i, shape in enumerate(shapes):
        top, left, rows, columns = box.extent(shape, maps.shape[-1])
        part = np.ascontiguousarray(maps[i : i + 1, top : top + rows, left : left + columns])
        result[i] = squared(part, maps.shape[-1])[0]
    return result
