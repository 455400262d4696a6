"""One image file as arrays of 8-bit values, decoded and resized.

This module and those that it imports need Pillow and numpy only: the processes that read ahead start without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from fastmaf.images.image_file import decode
from fastmaf.images.strips import to_array
from fastmaf.images.to_8_bits import to_8_bits


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """One image file; the attributes are those of ``fastmaf.images.decode.Frame``, as arrays.

    ``pixels`` and ``double`` are uint8 [3, size, size], ``full`` is uint8 [height, width] or [height, width, 3].
    """

    path: Path
    pixels: np.ndarray
    height: int
    width: int
    kinds: tuple[str, ...]
    decode_seconds: float
    resize_seconds: float
    full: np.ndarray | None = None
    double: np.ndarray | None = None


def read_image(
    path: Path,
    size: int,
    *,
    keep_full: bool = False,
    double: bool = False,
    content: bytes | None = None,
    max_pixels: int | None = None,
) -> DecodedImage:
    """Reads one image file, or its ``content``; arguments and errors as ``fastmaf.images.decode.load_frame``."""
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, found {size}")
    started = perf_counter()
    stored, bits, turn, kinds = decode(path, content, max_pixels)
    image = to_8_bits(stored, bits, path, kinds)
    del stored  # as large as the converted image
    if turn is not None:
        image = image.transpose(turn)
    decoded = perf_counter()
    pixels = resized_array(image, size)
    ready = perf_counter()
    return DecodedImage(
        path=path,
        pixels=pixels,
        height=image.height,
        width=image.width,
        kinds=tuple(kinds),
        decode_seconds=decoded - started,
        resize_seconds=ready - decoded,
        full=to_array(image) if keep_full else None,
        double=resized_array(image, 2 * size) if double else None,
    )


def resized_array(image: Image.Image | np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resizes an RGB or grey image, or an array uint8 [h, w, 3], to uint8 [3, size, size], or [3, *size]."""
    height, width = (size, size) if isinstance(size, int) else size
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    values = to_array(image.resize((width, height), Image.Resampling.BILINEAR))
    planes = np.broadcast_to(values, (3, height, width)) if values.ndim == 2 else values.transpose(2, 0, 1)
    return np.ascontiguousarray(planes)
