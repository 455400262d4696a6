"""Reading one image file: whatever it holds becomes 8-bit RGB, and what had to be done to it is said.

Every image is decoded once, turned to RGB and resized as torchvision's ``Resize`` does on a PIL image (bilinear with
antialiasing, straight to a square).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmaf.images.image_file import MAX_PIXELS, DataError, decode
from fastmaf.images.notes import sentences
from fastmaf.images.strips import to_array
from fastmaf.images.to_8_bits import to_8_bits

__all__ = ["MAX_PIXELS", "DataError", "Frame", "load_frame", "load_image", "resized", "sentences"]


@dataclass(frozen=True, eq=False)
class Frame:
    """One image file, decoded and resized.

    Attributes:
        path: The file.
        pixels: uint8 [3, size, size], channels R, G, B, rows from the top.
        height: Of the image as it is to be seen, that is after its EXIF rotation, in pixels; so is ``width``.
        width: See ``height``.
        kinds: What was not plain 8-bit RGB about it, for ``sentences``, which counts over many.
        decode_seconds: From the opening of the file to its RGB values at full resolution.
        resize_seconds: From those values to ``pixels``.
        full: The image at full resolution, uint8 [3, height, width], to be read only: its strides are not those of a
            contiguous tensor, and the channels of a grey image share their memory. None unless asked for.
    """

    path: Path
    pixels: Tensor
    height: int
    width: int
    kinds: tuple[str, ...]
    decode_seconds: float
    resize_seconds: float
    full: Tensor | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to an image that was not plain 8-bit RGB, in words."""
        return tuple(sentences(Counter(self.kinds)))


def load_frame(path: str | Path, size: int, *, keep_full: bool = False) -> Frame:
    """One file, decoded once and resized.

    At its peak this takes about 8 bytes for each pixel of the file: what Pillow holds, and an 8-bit copy. Of a
    progressive JPEG libjpeg keeps all coefficients (up to 10 bytes in all), of a compressed TIFF libtiff a strip, which
    may be the whole image (up to 12).

    Args:
        path: The file; a leading ~ is taken as it is. Only regular files are opened.
        size: Side of the square that it is resized to, in pixels.
        keep_full: Keep the image at full resolution, too.

    Raises:
        DataError: The file is missing, no regular file, truncated, no PNG, JPEG, BMP or TIFF, of more than
            ``MAX_PIXELS`` pixels, or of a range whose white is unknown.
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, found {size}")
    path = Path(path)
    started = perf_counter()
    image, kinds = _decode(path)
    decoded = perf_counter()
    pixels = resized(image, size)
    ready = perf_counter()
    return Frame(
        path=path,
        pixels=pixels,
        height=image.height,
        width=image.width,
        kinds=tuple(kinds),
        decode_seconds=decoded - started,
        resize_seconds=ready - decoded,
        full=_channels_first(image) if keep_full else None,
    )


def load_image(path: str | Path, size: int) -> tuple[Tensor, list[str]]:
    """One file -> (uint8 [3, size, size], notes in words).

    Raises:
        DataError: As ``load_frame``.
    """
    frame = load_frame(Path(path).expanduser(), size)
    return frame.pixels, list(frame.notes)


def resized(image: Image.Image | np.ndarray, size: int) -> Tensor:
    """RGB or grey image, or uint8 [h, w, 3] -> uint8 [3, size, size]: the one way in which fastmaf resizes."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return _channels_first(image.resize((size, size), Image.Resampling.BILINEAR)).contiguous()


def _decode(path: Path) -> tuple[Image.Image, list[str]]:
    """(RGB or grey image at full resolution, as it is to be seen, and kinds of note)."""
    stored, bits, turn, kinds = decode(path)
    image = to_8_bits(stored, bits, path, kinds)
    del stored  # it is as large as what is made of it
    return (image if turn is None else image.transpose(turn)), kinds


def _channels_first(image: Image.Image) -> Tensor:
    """RGB or grey image -> uint8 [3, h, w]; grey is held once for all three channels."""
    pixels = torch.from_numpy(to_array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)
