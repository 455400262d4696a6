"""What a ``Detector`` accepts as images: arrays, tensors and paths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmaf.images.decode import DataError, load_frame, resized
from fastmaf.inspection.model import Shapes
from fastmaf.inspection.sizes import SIZES, sizes_for
from fastmaf.io.marks import is_output


def are_images(X: Any) -> bool:
    """Returns whether X holds images: it has at least 3 axes, or its first element is a path or has 3 axes."""
    if isinstance(X, (str, os.PathLike)):
        raise ValueError(f"X must be a sequence of paths or images; found the one path {os.fspath(X)!r}")
    shape = getattr(X, "shape", None)
    if shape is None and not isinstance(X, Sequence):
        return False
    if shape is not None and len(shape) != 1:
        return len(shape) > 2
    first: Any = next(iter(X), None)
    return isinstance(first, (str, os.PathLike)) or (not isinstance(first, dict) and np.ndim(first) == 3)


def square_pixels(X: Any, size: int, *, double: bool = False) -> tuple[Tensor, Tensor | None, Shapes]:
    """Converts images of any form to uint8 [n, 3, size, size], and on request to twice the size; with their shapes."""
    if isinstance(X, Tensor):
        X = X.detach().cpu().numpy()
    pixels: list[tuple[Tensor, ...]] = []
    shapes: list[tuple[int, int]] = []
    sizes = (size, 2 * size) if double else (size,)
    for i, image in enumerate(X):
        if isinstance(image, (str, os.PathLike)):
            if is_output(image):
                raise DataError(f"{os.fspath(image)}: a picture written by fastmaf, which is never read as an image")
            frame = load_frame(Path(image).expanduser(), size, double=double)
            shapes.append((frame.height, frame.width))
            pixels.append((frame.pixels,) if frame.double is None else (frame.pixels, frame.double))
        else:
            values = np.asarray(image)
            if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != 3 or 0 in values.shape:
                found = f"{values.dtype} {list(values.shape)}"
                raise ValueError(f"images must be uint8 [n, h, w, 3]; found {found} as image {i}")
            shapes.append((values.shape[0], values.shape[1]))
            pixels.append(tuple(resized(values, side) for side in sizes))
    if not pixels:
        raise ValueError(f"X must hold at least 1 image, uint8 [n, h, w, 3]{found_in(X)}")
    stacked = [torch.stack(images) for images in zip(*pixels, strict=True)]
    return stacked[0], stacked[1] if double else None, shapes


def pixels_for_sizes(X: Any, budget: float) -> tuple[tuple[int, ...], Tensor, Tensor | None]:
    """Returns the sizes to fit within a budget of seconds, none larger than an image, and the images at the largest.

    The last result is the images at twice that size, where all images are that large: enlarged ones hold no finer
    shifts.
    """
    pixels, double, shapes = square_pixels(X, SIZES[1], double=True)
    side = min(map(min, shapes))
    sizes = sizes_for(side, budget)
    if sizes[-1] != SIZES[1]:
        pixels, double, _ = square_pixels(X, sizes[-1], double=True)
    return sizes, pixels, double if side >= 2 * sizes[-1] else None


def found_in(X: Any) -> str:
    """Returns what X is, for the end of an error message."""
    shape = getattr(X, "shape", None)
    return f"; found {type(X).__name__}" if shape is None else f"; found {getattr(X, 'dtype', '')} {list(shape)}"
