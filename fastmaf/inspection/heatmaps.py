"""Anomaly maps in the frame of the image that was scored: overlays to look at, and files that keep the numbers.

The frame is that of the image as it is to be seen, that is after its EXIF rotation: ``Frame.height`` and ``width`` of
``fastmaf.images.decode``. The image was squeezed to a square before it was scored, so a map is only resized.
"""

from __future__ import annotations

import functools
import io
import zlib
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from fastmaf.images.decode import MAX_PIXELS, DataError
from fastmaf.images.png import png_text
from fastmaf.inspection.pixels import resize_map
from fastmaf.io.atomic import written_atomically
from fastmaf.io.marks import MAP, MAP_TITLE, OVERLAY
from fastmaf.io.regular import NotRegularError, open_regular

SCALE = 512.0
"""Levels of a 16-bit map per unit: steps of 1/512 up to 128 times what is usual."""

UNIT = "times the root mean square of normal images"

_FAST = {"compress_level": 1, "compress_type": zlib.Z_RLE}  # of photographs, more effort saves little
_TIFF_DESCRIPTION = 270
_OPACITY = 0.6  # of the strongest colour: what it marks stays visible


def to_frame(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map [s, t] in the frame of an image of ``shape`` = (height, width): float32 [h, w], ``resize_map``'s values."""
    return resize_map(values, shape).astype(np.float32)


def overlay(image: np.ndarray, values: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """The image with its map laid over it in colours, the more opaque the higher the value; a new uint8 [h, w, 3].

    The colours are those of matplotlib's inferno from a dark violet to orange. Its lightness rises evenly and
    monotonically, so a higher value looks higher, also without colours and to the colour-blind; turbo's and jet's does
    not. Black and pale yellow are left out: they would look like a dark spot, and like nothing on a white background.

    Args:
        image: uint8 [h, w, 3].
        values: the map in the image's frame, finite or infinite, [h, w].
        low: the image is untouched where the map is no higher; a high quantile of what normal images reach.
        high: colour and opacity are at their strongest from here on; above ``low``.

    Raises:
        ValueError: shapes, or ``low`` and ``high``, are not as above; the map holds NaN.
    """
    image, values = _checked(image), np.asarray(values, dtype=np.float32)
    if values.shape != image.shape[:2]:
        raise ValueError(f"the map must have the image's shape {list(image.shape[:2])}; found {list(values.shape)}")
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f"low and high must be finite, low < high; found {low} and {high}")
    if np.isnan(values).any():
        raise ValueError("the map holds NaN")
    level = np.clip((values - np.float32(low)) * np.float32(255 / (high - low)), 0, 255).astype(np.uint8)
    colours, opacity = _palette()
    index = Image.fromarray(level)
    mask = index.point(opacity)
    index.putpalette(colours)
    return np.array(Image.composite(index.convert("RGB"), Image.fromarray(image), mask))


def mask_outline(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with a line just around what a mask covers, cyan on black; a new uint8 [h, w, 3].

    The line is 1 pixel wide, 2 in images of 500 pixels and more, with a black one of 1 pixel outside it; no colour of
    ``overlay`` is like cyan. It leaves open where the mask reaches the image's edge.

    Args:
        image: uint8 [h, w, 3].
        mask: the defect, bool [h, w] (or numbers, 0 outside).

    Raises:
        ValueError: the shapes differ.
    """
    image, mask = _checked(image), np.asarray(mask) != 0
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the mask must have the image's shape {list(image.shape[:2])}; found {list(mask.shape)}")
    line = _grown(mask, 1 if min(mask.shape) < 500 else 2)
    out = image.copy()
    out[_grown(line, 1) & ~line] = (0, 0, 0)
    out[line & ~mask] = (0, 255, 255)
    return out


def write_overlay(path: str | Path, image: np.ndarray, values: np.ndarray, low: float, high: float) -> None:
    """Writes ``overlay`` as a PNG; arguments and errors as there, and the file's suffix must be .png."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: overlays are written as .png; found {path.suffix or 'no suffix'}")
    picture = Image.fromarray(overlay(image, values, low=low, high=high))
    with written_atomically(path) as file:
        picture.save(file, format="PNG", pnginfo=png_text(OVERLAY), **_FAST)


def write_map(path: str | Path, values: np.ndarray, *, scale: float = SCALE, unit: str = UNIT) -> None:
    """Writes a map: 16-bit grey PNG, or 32-bit floating-point TIFF, by the suffix; ``read_map`` gives it back.

    A PNG's levels are round(value · scale), clipped to 0..65535: the same scale for all maps, so that they can be
    compared. Its text chunks Scale and Unit say so, and Description the formula. A TIFF holds the values as they are,
    NaN and infinities too, and the unit as its ImageDescription.

    Args:
        path: the file: .png, .tif or .tiff.
        values: [h, w]; for a PNG without NaN.
        scale: levels per unit, of a PNG.
        unit: of the values, in words.

    Raises:
        ValueError: another suffix, an empty map or one with other than 2 axes, NaN in a PNG, a scale that is no
            positive number.
    """
    path, values = Path(path), np.asarray(values, dtype=np.float32)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{path}: a map must be [h, w], neither of them 0; found {list(values.shape)}")
    suffix = path.suffix.lower()
    if suffix == ".png":
        if not (np.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a positive number; found {scale}")
        if np.isnan(values).any():
            raise ValueError(f"{path}: the map holds NaN, which a PNG cannot; write a .tiff")
        levels = np.clip(np.rint(values.astype(np.float64) * scale), 0, 65535).astype(np.uint16)
        text = png_text(MAP)
        text.add_text("Scale", repr(float(scale)))
        text.add_itxt("Unit", unit)
        text.add_text("Description", f"{MAP_TITLE}: value = level / {float(scale)!r}")
        with written_atomically(path) as file:
            Image.fromarray(levels).save(file, format="PNG", pnginfo=text, **_FAST)
    elif suffix in (".tif", ".tiff"):
        tags = ImageFileDirectory_v2()
        tags[_TIFF_DESCRIPTION] = f"{MAP_TITLE}, {unit}"
        encoded = io.BytesIO()  # Pillow writes a TIFF past Python's buffer, and overlooks a write that is cut short
        Image.fromarray(values).save(encoded, format="TIFF", tiffinfo=tags)
        with written_atomically(path) as file:
            file.write(encoded.getbuffer())
    else:
        raise ValueError(f"{path}: maps are written as .png, .tif or .tiff; found {path.suffix or 'no suffix'}")


def read_map(path: str | Path) -> np.ndarray:
    """Reads what ``write_map`` wrote, float32 [h, w]: from a PNG within half a step, 0.5 / scale, unless clipped.

    Raises:
        DataError: the file is missing, damaged, or no map.
    """
    path = Path(path)
    try:
        with open_regular(path) as file, Image.open(file, formats=("PNG", "TIFF")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded")
            if image.format == "PNG" and image.mode in ("I;16", "I") and "Scale" in image.info:
                return (np.asarray(image).astype(np.float64) / float(image.info["Scale"])).astype(np.float32)
            if image.format == "TIFF" and image.mode == "F":
                return np.array(image)
            raise DataError(
                f"{path}: no anomaly map; expected a 16-bit grey PNG with the text chunk Scale, or a 32-bit "
                f"floating-point TIFF, found {image.format} of mode {image.mode}"
            )
    except DataError:
        raise
    except NotRegularError as error:
        raise DataError(str(error)) from None
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _checked(image: np.ndarray) -> np.ndarray:
    image = np.ascontiguousarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"an image must be uint8 [h, w, 3]; found {image.dtype} {list(image.shape)}")
    return image


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    """What lies within so many pixels, along rows and columns, of what a mask covers."""
    for axis in (0, 1):
        at = np.moveaxis(mask, axis, 0)
        grown = at.copy()
        for k in range(1, by + 1):
            grown[k:] |= at[:-k]
            grown[:-k] |= at[k:]
        mask = np.moveaxis(grown, 0, axis)
    return mask


@functools.cache
def _palette() -> tuple[bytes, list[int]]:
    """Colours of the levels 0 to 255, R, G, B, and how opaque each is, 0 to 255; level 0 not at all."""
    share = np.linspace(0, 1, 256)
    colours = matplotlib.colormaps["inferno"](0.2 + 0.6 * share, bytes=True)[:, :3]
    return colours.tobytes(), np.rint(255 * _OPACITY * share**0.75).astype(int).tolist()
