"""Conversion of decoded images to 8-bit grey or RGB, one strip at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmaf.images.image_file import DataError
from fastmaf.images.strips import strips

_WHITE_IS_ZERO = 262  # TIFF tag PhotometricInterpretation; its value 0 means that white is zero


def to_8_bits(image: Image.Image, bits: int, path: Path, kinds: list[str]) -> Image.Image:
    """Converts an image to mode L or RGB.

    Args:
        image: the decoded image, of any mode; returned as it is where no conversion is needed.
        bits: bits of one value in the file.
        path: the file, for messages.
        kinds: kinds of conversion; new ones are appended.

    Raises:
        DataError: the white level is unknown.
    """
    mode, transparent = image.mode, "transparency" in image.info
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _scaled(image, bits, path, kinds)
    if mode in ("RGB", "RGBA", "RGBX", "RGBa", "LA", "La", "CMYK") and bits > 8:
        # Pillow has no 16-bit colour and keeps each value's high byte: at most one grey level from value / 257, and
        # exact where 8-bit values were widened (times 256 or 257).
        kinds.append("colour16")
        if mode in ("RGB", "LA", "RGBA"):
            extrema: Any = image.getextrema()
            _note_dim(256 * max(high for _, high in extrema[: 1 if mode == "LA" else 3]), 65535, kinds)
        if isinstance(key := image.info.get("transparency"), tuple):
            image.info["transparency"] = tuple(value >> 8 for value in key)
    if mode in ("P", "PA"):
        kinds.append("palette")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or transparent:
        kinds.append("alpha")
        return _on_white(image)
    if mode in ("1", "L"):
        kinds.append("grey")
        return image if mode == "L" else image.convert("L")
    if mode == "CMYK":
        kinds.append("cmyk")
    elif mode not in ("RGB", "RGBX", "P"):
        kinds.append("mode")
    if mode == "RGB":
        return image
    result = Image.new("RGB", image.size)
    for top, strip in strips(image):
        result.paste(strip.convert("RGB"), (0, top))
    return result


def _on_white(image: Image.Image) -> Image.Image:
    result = Image.new("RGB", image.size)
    for top, strip in strips(image):
        strip = strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


def _scaled(image: Image.Image, bits: int, path: Path, kinds: list[str]) -> Image.Image:
    """Scales grey values of more than 8 bits to mode L; ``convert("RGB")`` would clip them at 255.

    The white level is that of the file's format, the same for all images of a set.
    """
    ranges = np.array([(values.min(), values.max()) for _, values in _values(image)], dtype=np.float64)
    low, high = float(ranges[:, 0].min()), float(ranges[:, 1].max())
    if image.mode == "F":
        kind, white = "float", 1.0
    elif bits == 12:
        kind, white = "grey12", 4095.0
    else:
        kind, white = "grey16" if bits == 16 else "int32", 65535.0
    # This also refuses NaN, negative values, and 32-bit files that may hold 8-bit values.
    if not (low >= 0.0 and high <= white) or (kind == "int32" and high <= 255):
        found = f"{'floating-point' if kind == 'float' else f'{bits}-bit'} grey from {low:g} to {high:g}"
        raise DataError(f"{path}: {found} has an unknown white level: save it with 8 or 16 bits, unsigned")
    kinds.append(kind)
    if kind == "float":
        kinds += ["dark16"] * (high <= 1 / 255)
    else:
        _note_dim(high, white, kinds)
    tags = getattr(image, "tag_v2", None)
    inverted = tags is not None and tags.get(_WHITE_IS_ZERO) == 0
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        kinds.append("alpha")
    result = Image.new("L", image.size)
    for top, values in _values(image):
        scaled = values.astype(np.float64) * (255.0 / white)
        grey = np.rint(255.0 - scaled if inverted else scaled).astype(np.uint8)
        if isinstance(clear, int):
            grey[values == clear] = 255
        result.paste(Image.fromarray(grey), (0, top))
    return result


def _values(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    return ((top, np.asarray(strip)) for top, strip in strips(image))


def _note_dim(high: float, white: float, kinds: list[str]) -> None:
    """Notes a largest value that suggests another white level than the assumed one."""
    if high <= 255:
        kinds.append("dark16")
    elif high <= 4095 < white:
        kinds.append("dim16")
