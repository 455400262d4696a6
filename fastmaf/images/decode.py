"""Reading one image file as 8-bit RGB.

Every image is decoded once, converted to RGB and resized as torchvision's ``Resize`` does on a PIL image: bilinear with
antialiasing, directly to a square. Conversions are recorded and described by ``sentences``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmaf.images.decoded_image import DecodedImage, read_image, resized_array
from fastmaf.images.image_file import MAX_PIXELS, DataError

__all__ = ["MAX_PIXELS", "DataError", "Frame", "load_frame", "load_image", "resized", "sentences", "as_frame"]

# {images} becomes "image" or "images", {its} becomes "its" or "their".
_NOTES = {
    "grey": "{n} grey {images}, with R = G = B",
    "grey16": "{n} 16-bit grey {images} scaled to 8 bits (value / 257)",
    "grey12": "{n} 12-bit grey {images} scaled to 8 bits (value / 4095 * 255)",
    "dim16": "{n} 16-bit {images} with no value above 4095: too dark if the camera wrote 12-bit values",
    "dark16": "{n} almost black {images} of more than 8 bits (no value above 255, or 1/255 of white): "
    "save 8-bit values with 8 bits",
    "int32": "{n} 32-bit grey {images} read as 16-bit (no value above 65535) and scaled to 8 bits",
    "float": "{n} floating-point grey {images} scaled from 0..1 to 8 bits",
    "colour16": "{n} 16-bit colour {images} read at 8 bits (the high byte of each value)",
    "palette": "{n} palette {images} read as RGB",
    "alpha": "{n} {images} with an alpha channel composited on white",
    "cmyk": "{n} CMYK {images} converted to RGB (no colour profile applied)",
    "mode": "{n} {images} in another colour space converted to RGB",
    "exif": "{n} {images} turned by {its} EXIF orientation",
    "bad_exif": "{n} {images} with damaged EXIF data, read without {its} orientation",
    "frames": "{n} {images} with several frames or pages: only the first is read",
}


def sentences(kinds: Counter[str]) -> list[str]:
    """Describes the conversions of images that were not plain 8-bit RGB, one sentence per kind."""
    forms = {True: {"images": "image", "its": "its"}, False: {"images": "images", "its": "their"}}
    return [text.format(n=kinds[kind], **forms[kinds[kind] == 1]) for kind, text in _NOTES.items() if kinds[kind]]


@dataclass(frozen=True, eq=False)
class Frame:
    """One image file, decoded and resized.

    Attributes:
        path: the file.
        pixels: uint8 [3, size, size], channels R, G, B, rows from the top.
        height, width: size in pixels, after applying the EXIF orientation.
        kinds: kinds of conversion that were needed; see ``sentences``.
        decode_seconds: time from opening the file to RGB values at full resolution.
        resize_seconds: time from those values to ``pixels``.
        full: the image at full resolution, uint8 [3, height, width]; None unless requested. Read-only: it is not
            contiguous, and the channels of a grey image share memory.
        double: the image at twice the size, uint8 [3, 2 size, 2 size]; None unless requested.
    """

    path: Path
    pixels: Tensor
    height: int
    width: int
    kinds: tuple[str, ...]
    decode_seconds: float
    resize_seconds: float
    full: Tensor | None = None
    double: Tensor | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the conversions of this image."""
        return tuple(sentences(Counter(self.kinds)))


def load_frame(path: str | Path, size: int, *, keep_full: bool = False, double: bool = False) -> Frame:
    """Reads one image file.

    Peak memory is about 8 bytes per pixel of the file: Pillow's image and an 8-bit copy. A progressive JPEG needs up to
    10 bytes (libjpeg keeps all coefficients), a compressed TIFF up to 12 (libtiff keeps a strip, possibly the whole
    image), a WebP up to 24 (libwebp keeps two frames of an animation).

    Args:
        path: the file; a leading ~ is not expanded. Only regular files are opened.
        size: side of the square that the image is resized to, in pixels.
        keep_full: keep the image at full resolution as well.
        double: resize the image to twice the size as well.

    Raises:
        DataError: the file is missing, not a regular file, truncated, not a PNG, JPEG, BMP, TIFF or WebP, has more than
            ``MAX_PIXELS`` pixels, or has an unknown white level.
    """
    return as_frame(read_image(Path(path), size, keep_full=keep_full, double=double))


def as_frame(image: DecodedImage) -> Frame:
    """Returns an image with tensors instead of arrays, which share its memory."""
    full = None if image.full is None else torch.from_numpy(image.full)
    if full is not None:
        full = full.permute(2, 0, 1) if full.ndim == 3 else full.expand(3, -1, -1)
    return Frame(
        path=image.path,
        pixels=torch.from_numpy(image.pixels),
        height=image.height,
        width=image.width,
        kinds=image.kinds,
        decode_seconds=image.decode_seconds,
        resize_seconds=image.resize_seconds,
        full=full,
        double=None if image.double is None else torch.from_numpy(image.double),
    )


def load_image(path: str | Path, size: int) -> tuple[Tensor, list[str]]:
    """Reads one image file; returns its pixels, uint8 [3, size, size], and notes. Errors as ``load_frame``."""
    frame = load_frame(Path(path).expanduser(), size)
    return frame.pixels, list(frame.notes)


def resized(image: Image.Image | np.ndarray, size: int | tuple[int, int]) -> Tensor:
    """Resizes an RGB or grey image, or an array uint8 [h, w, 3], to uint8 [3, size, size], or [3, *size]."""
    return torch.from_numpy(resized_array(image, size))
