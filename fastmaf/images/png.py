"""Images as PNG files: one alone, or many in a grid. Written atomically; `fastmaf.metrics.plots` passes both on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from fastmaf.images.names import visible
from fastmaf.io.atomic import written_atomically
from fastmaf.io.marks import GRID, KEYWORD, SAMPLE, png_text

_DPI = 120


@matplotlib.style.context("default")
def image_grid(
    path: str | Path,
    images: np.ndarray,
    *,
    columns: int | None = None,
    titles: Sequence[str] | None = None,
    scale: int | None = None,
) -> Figure:
    """One picture of many images, row by row, each pixel enlarged to an exact square of scale x scale.

    Args:
        path: the PNG to write.
        images: uint8 [n, h, w, 3].
        columns: images in a row; by default all of up to six, else a near-square grid.
        titles: one text above each image.
        scale: enlargement; by default images become about 192 pixels wide, fewer in large grids.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        raise ValueError(f"images must be uint8 [n, h, w, 3] with n >= 1, found {images.dtype} {list(images.shape)}")
    n, height, width, _ = images.shape
    if titles is not None and len(titles) != n:
        raise ValueError(f"each image needs its title, found {n} images and {len(titles)} titles")
    if any(option is not None and option < 1 for option in (columns, scale)):
        raise ValueError(f"columns and scale must be at least 1, found columns={columns}, scale={scale}")
    columns = min(n, columns or (n if n <= 6 else math.ceil(math.sqrt(n))))
    rows = math.ceil(n / columns)
    scale = scale or max(1, round(min(192, 2400 / columns) / width))
    gap, header = 6, 22 if titles is not None else 0
    h, w = height * scale, width * scale
    canvas = np.full((gap + rows * (h + header + gap), gap + columns * (w + gap), 3), 255, np.uint8)
    figure = Figure(figsize=(canvas.shape[1] / _DPI, canvas.shape[0] / _DPI), dpi=_DPI, facecolor="white")
    for i in range(n):
        top, left = gap + (i // columns) * (h + header + gap) + header, gap + (i % columns) * (w + gap)
        canvas[top : top + h, left : left + w] = images[i].repeat(scale, 0).repeat(scale, 1)
        if titles is not None:
            fits = max(3, int(w / 7.5))  # characters of this font that find room above the image
            title = visible(titles[i])
            text = title if len(title) <= fits else title[: fits - 1] + "\u2026"
            x, y = (left + w / 2) / canvas.shape[1], 1 - (top - 5) / canvas.shape[0]
            figure.text(x, y, text, ha="center", va="baseline", fontsize=7, color="black", parse_math=False)
    figure.figimage(canvas, 0, 0, origin="upper", zorder=-1)
    with written_atomically(path) as file:
        figure.savefig(file, format="png", dpi=_DPI, facecolor="white", metadata={KEYWORD: GRID})
    return figure


def save_png(path: str | Path, image: np.ndarray, *, role: str = SAMPLE) -> None:
    """Write one image, uint8 [h, w, 3], as it is, with the mark of a role; see `fastmaf.io.marks`."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"an image must be uint8 [h, w, 3], found {image.dtype} {list(image.shape)}")
    with written_atomically(path) as file:
        Image.fromarray(np.ascontiguousarray(image)).save(file, format="PNG", pnginfo=png_text(role))
