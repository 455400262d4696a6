"""Reading one image file: whatever it holds becomes 8-bit RGB, and what had to be done to it is said.

Every image is decoded once, turned to RGB and resized as torchvision's ``Resize`` does on a PIL image (bilinear with
antialiasing, straight to a square).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
"""The only decoders Pillow may try: fewer parsers for a hostile or mislabelled file to reach."""

MAX_PIXELS = 64_000_000
"""Largest width x height that is decoded; Pillow's own bomb warning starts at 89,478,485."""

# {images} becomes "image" or "images", {its} becomes "its" or "their".
_NOTES = {
    "grey": "{n} grey {images} read as RGB",
    "grey16": "{n} 16-bit grey {images} scaled to 8 bits (value / 257)",
    "grey12": "{n} 12-bit grey {images} scaled to 8 bits (value / 4095 * 255)",
    "dim16": "{n} 16-bit {images} with no value above 4095: too dark if the camera wrote 12-bit values",
    "int32": "{n} 32-bit grey {images} read as 16-bit (no value above 65535) and scaled to 8 bits",
    "float": "{n} floating-point grey {images} scaled from 0..1 to 8 bits",
    "colour16": "{n} 16-bit colour {images} read at 8 bits (the high byte of each value)",
    "palette": "{n} palette {images} read as RGB",
    "alpha": "{n} {images} with an alpha channel composited on white",
    "cmyk": "{n} CMYK {images} converted to RGB (no colour profile applied)",
    "mode": "{n} {images} in another colour space converted to RGB",
    "exif": "{n} {images} turned by {its} EXIF orientation",
    "frames": "{n} {images} with several frames or pages: only the first one read",
}


_SIGNATURES = {
    b"\x89PNG": "a damaged PNG",
    b"\xff\xd8": "a damaged JPEG",
    b"BM": "a damaged BMP",
    b"II*\0": "a damaged TIFF",
    b"MM\0*": "a damaged TIFF",
    b"GIF8": "a GIF",
    b"RIFF": "a WebP, AVI or WAV file",
    b"PK": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF",
    b"<": "HTML, XML or SVG",
}


class DataError(ValueError):
    """A data folder or an image file that cannot be used; the message names it and what was expected and found."""


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
        full: The image at full resolution, uint8 [3, height, width], strides not those of a contiguous tensor; None
            unless asked for.
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

    Args:
        path: The file; a leading ~ is taken as it is.
        size: Side of the square that it is resized to, in pixels.
        keep_full: Keep the image at full resolution, too.

    Raises:
        DataError: The file is missing, truncated, no PNG, JPEG, BMP or TIFF, too large, or of a range without a white.
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
    """RGB image, or uint8 [h, w, 3] -> uint8 [3, size, size]: the one way in which fastmaf resizes what it scores."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return _channels_first(image.resize((size, size), Image.Resampling.BILINEAR)).contiguous()


def _channels_first(image: Image.Image) -> Tensor:
    """RGB image -> uint8 [3, h, w], a view of a copy."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _decode(path: Path) -> tuple[Image.Image, list[str]]:
    """(RGB image at full resolution, kinds of note)."""
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    # Another library in the process may have switched this on; half an image must not pass for a whole one.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    start = b""
    try:
        with open(path, "rb") as stream:
            start = stream.read(26)
            stream.seek(0)
            return _read_rgb(stream, start, path)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"{path}: no image that can be read, or one cut short; expected {', '.join(FORMATS)}, found "
            f"{_kind_of(start)}"
        ) from None
    except Exception as error:  # a damaged file makes Pillow raise almost anything, from SyntaxError to struct.error
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _kind_of(start: bytes) -> str:
    """Returns what a file seems to be, by its first bytes, quoting none: a name may be a link to any file."""
    if not start:
        return "an empty file"
    return next(
        (name for signature, name in _SIGNATURES.items() if start.startswith(signature)), "another kind of file"
    )


def _read_rgb(stream: BinaryIO, start: bytes, path: Path) -> tuple[Image.Image, list[str]]:
    kinds: list[str] = []
    image: Image.Image = Image.open(stream, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{path}: {width} x {height} = {width * height:,} pixels; at most {MAX_PIXELS:,} are decoded")
    if getattr(image, "n_frames", 1) > 1:
        kinds.append("frames")
    # Asked before the decoding: Pillow turns a TIFF while it loads it and drops the tag.
    if image.getexif().get(0x0112, 1) in range(2, 9):
        kinds.append("exif")
    image.load()
    bits = _bits(image, start)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGB", "RGBA", "RGBX", "RGBa", "LA", "La", "CMYK") and bits > 8:
        # Pillow holds no 16-bit colour: it keeps each value's high byte, which neither clips nor is more than one
        # grey level from value / 257, and is exact where 8-bit values were widened (times 256 or 257).
        kinds.append("colour16")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image, bits, path, kinds).convert("RGB"), kinds
    if image.mode in ("P", "PA"):
        kinds.append("palette")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        kinds.append("alpha")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode in ("1", "L"):
        kinds.append("grey")
    elif image.mode == "CMYK":
        kinds.append("cmyk")
    elif image.mode not in ("RGB", "RGBX", "P"):
        kinds.append("mode")
    return image.convert("RGB"), kinds


def _bits(image: Image.Image, start: bytes) -> int:
    """Bits of one value in the file, which Pillow's mode does not tell."""
    if image.format == "PNG":
        return start[24]  # IHDR: after the signature (8), length and name (8), width and height (8)
    tags = getattr(image, "tag_v2", None)
    found = tags.get(258, 8) if tags is not None else 8
    return int(max(found) if isinstance(found, tuple) else found)


def _scaled(image: Image.Image, bits: int, path: Path, kinds: list[str]) -> Image.Image:
    """Grey of more than 8 bits -> mode L, scaled: ``convert("RGB")`` would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        kind, white = "float", 1.0
    elif bits == 12:
        kind, white = "grey12", 4095.0
    else:
        kind, white = "grey16" if bits == 16 else "int32", 65535.0
    # Also refused: NaN, signed values, and 32-bit files that may as well hold 8-bit values.
    if not (low >= 0.0 and high <= white) or (kind == "int32" and high <= 255):
        found = f"{'floating-point' if kind == 'float' else f'{bits}-bit'} grey from {low:g} to {high:g}"
        raise DataError(f"{path}: {found}, whose white is unknown: save it with 8 or 16 bits, unsigned")
    kinds += [kind] + ["dim16"] * (white == 65535.0 and 255 < high <= 4095)
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))


def sentences(kinds: Counter[str]) -> list[str]:
    """What was done to images that were not plain 8-bit RGB, one sentence a kind."""
    forms = {True: {"images": "image", "its": "its"}, False: {"images": "images", "its": "their"}}
    return [text.format(n=kinds[kind], **forms[kinds[kind] == 1]) for kind, text in _NOTES.items() if kinds[kind]]
