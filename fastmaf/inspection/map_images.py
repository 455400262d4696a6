"""Anomaly maps in the frame of the scored image: overlays to look at, and files that keep the values.

The frame is that of the upright image, after its EXIF rotation: ``Frame.height`` and ``width`` of
``fastmaf.images.decode``. The image was squeezed to a square before scoring, so a map only needs resizing.
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

from fastmaf.images.png import png_text
from fastmaf.inspection.legend import with_legend
from fastmaf.inspection.outlines import outline
from fastmaf.io.atomic import written_atomically
from fastmaf.io.marks import MAP, MAP_TITLE, OVERLAY
from fastmaf.metrics.pixel_ranks import resize_map

SCALE = 512.0
"""Levels of a 16-bit map per unit: steps of 1/512, up to 128 times the root mean square of good images."""

UNIT = "times the root mean square of good images"

_FAST = {"compress_level": 1, "compress_type": zlib.Z_RLE}  # more effort saves little on photographs
_TIFF_DESCRIPTION = 270
_ENLARGED = 512  # pixels that a small image is enlarged to at most, for the contour to be thinner than its pixels
_OPACITY = 0.45  # of the strongest colour: the defect stays visible below it


def to_frame(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Returns a map [s, t] resized by ``resize_map`` to ``shape`` = (height, width), float32 [h, w]."""
    return resize_map(values, shape).astype(np.float32)


def contour_level(values: np.ndarray, high: float, anomalous: bool) -> float | None:
    """Returns the level of the contour around the anomalous region of an image, or None if it has none.

    It is the highest value in the anomaly maps of good images, ``high``. In an anomalous image whose map stays low, it
    is half of the map's own maximum instead, so that the most anomalous region is always outlined.
    """
    largest = float(np.max(values))
    if anomalous and largest > 0:
        return min(high, largest / 2)
    return high if largest > high else None


def overlay(
    image: np.ndarray, values: np.ndarray, *, low: float, high: float, contour: float | None = None
) -> np.ndarray:
    """Returns the image with its anomaly map laid over it, more opaque for higher values; a new uint8 [h, w, 3].

    The colours are those of matplotlib's inferno from dark violet to orange. Its lightness increases monotonically, so
    higher values look higher, also in greyscale and to the colour-blind; those of turbo and jet do not. Black and pale
    yellow are left out: they would look like a dark spot, and be invisible on a white background.

    Args:
        image: uint8 [h, w, 3].
        values: the map in the image's frame, [h, w], without NaN.
        low: the image is unchanged up to this value; a high quantile of the maps of good images.
        high: colour and opacity are strongest from this value on; above ``low``.
        contour: a white line with a black edge is drawn around pixels above this value; see ``contour_level``.

    Raises:
        ValueError: an argument has another shape or type, or the map holds NaN.
    """
    image, values = np.ascontiguousarray(image), np.asarray(values, dtype=np.float32)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"an image must be uint8 [h, w, 3]; found {image.dtype} {list(image.shape)}")
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
    result = np.array(Image.composite(index.convert("RGB"), Image.fromarray(image), mask))
    if contour is None:
        return result
    return outline(result, values > contour, width=max(1, round(max(values.shape) / 400)))


def scale_colours() -> np.ndarray:
    """Returns the colours of an overlay on middle grey, uint8 ``[256, 3]``, for values from ``low`` to ``high``."""
    grey, values = np.full((1, 256, 3), 128, np.uint8), np.linspace(0, 1, 256)[None]
    return overlay(grey, values, low=0.0, high=1.0)[0]


def write_overlay(
    path: str | Path, image: np.ndarray, values: np.ndarray, low: float, high: float, *, score: float, threshold: float
) -> None:
    """Writes ``overlay`` with a contour as a PNG, with verdict, threshold and colour scale in a strip below.

    Small images are enlarged by a whole number, as far as they stay within 512 pixels; their pixels stay squares.

    Args:
        path: the file; its suffix must be .png.
        image, values, low, high: as of ``overlay``, and errors as there.
        score: of the image.
        threshold: of the model; the image is anomalous if its score is above.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: overlays are written as .png; found {path.suffix or 'no suffix'}")
    height, width = image.shape[:2]
    factor = max(1, _ENLARGED // max(1, height, width))
    if factor > 1:
        image = image.repeat(factor, 0).repeat(factor, 1)
        values = to_frame(values, (factor * height, factor * width))
    contour = contour_level(values, high, score > threshold)
    drawn = Image.fromarray(overlay(image, values, low=low, high=high, contour=contour))
    picture = with_legend(drawn, scale_colours(), low=low, high=high, contour=contour, score=score, threshold=threshold)
    with written_atomically(path) as file:
        picture.save(file, format="PNG", pnginfo=png_text(OVERLAY), **_FAST)


def write_map(path: str | Path, values: np.ndarray) -> None:
    """Writes a map as a 16-bit grey PNG or a 32-bit floating-point TIFF, by the suffix.

    A PNG's levels are round(value · 512), clipped to 0..65535: the same scale for all maps, so that they can be
    compared. Its text chunks Scale, Unit and Description document this. A TIFF holds the exact values, including NaN
    and infinities, and the unit as its ImageDescription.

    Args:
        path: the file: .png, .tif or .tiff.
        values: [h, w]; for a PNG without NaN.

    Raises:
        ValueError: another suffix, a map that is empty or not two-dimensional, or NaN in a PNG.
    """
    path, values = Path(path), np.asarray(values, dtype=np.float32)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{path}: a map must be [h, w], neither of them 0; found {list(values.shape)}")
    suffix = path.suffix.lower()
    if suffix == ".png":
        if np.isnan(values).any():
            raise ValueError(f"{path}: the map holds NaN, which a PNG cannot; write a .tiff")
        levels = np.clip(np.rint(values.astype(np.float64) * SCALE), 0, 65535).astype(np.uint16)
        text = png_text(MAP)
        text.add_text("Scale", repr(SCALE))
        text.add_itxt("Unit", UNIT)
        text.add_text("Description", f"{MAP_TITLE}: value = level / {SCALE!r}")
        with written_atomically(path) as file:
            Image.fromarray(levels).save(file, format="PNG", pnginfo=text, **_FAST)
    elif suffix in (".tif", ".tiff"):
        tags = ImageFileDirectory_v2()
        tags[_TIFF_DESCRIPTION] = f"{MAP_TITLE}, {UNIT}"
        encoded = io.BytesIO()  # Pillow's TIFF writer bypasses Python's buffer and ignores short writes
        Image.fromarray(values).save(encoded, format="TIFF", tiffinfo=tags)
        with written_atomically(path) as file:
            file.write(encoded.getbuffer())
    else:
        raise ValueError(f"{path}: maps are written as .png, .tif or .tiff; found {path.suffix or 'no suffix'}")


@functools.cache
def _palette() -> tuple[bytes, list[int]]:
    """Returns the colours of the levels 0 to 255, R, G, B, and their opacity, 0 to 255; level 0 is transparent."""
    share = np.linspace(0, 1, 256)
    colours = matplotlib.colormaps["inferno"](0.2 + 0.6 * share, bytes=True)[:, :3]
    return colours.tobytes(), np.rint(255 * _OPACITY * share**0.75).astype(int).tolist()
