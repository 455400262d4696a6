"""Images as PNG data URIs of a bounded size."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from fastmaf.inspection.outlines import CYAN, outline

WIDEST = 200
"""Largest width and height of an embedded image, in pixels."""


def data_uri(image: np.ndarray, mask: np.ndarray | None = None, widest: int = WIDEST) -> tuple[str, int, int]:
    """Encodes uint8 [h, w, 3] as ("data:image/png;base64,...", width, height).

    A small image is enlarged by an integer factor, so that its pixels stay squares; a large one is reduced.

    Args:
        image: uint8 [h, w, 3].
        mask: bool [h, w]; it is outlined in cyan.
        widest: the largest width and height.
    """
    factor = max(1, widest // max(image.shape[:2]))
    picture = Image.fromarray(np.ascontiguousarray(image).repeat(factor, 0).repeat(factor, 1))
    picture.thumbnail((widest, widest), Image.Resampling.LANCZOS, reducing_gap=None)
    if mask is not None:
        covered = Image.fromarray(np.asarray(mask, dtype=bool).astype(np.uint8) * 255)
        # BOX keeps structures thinner than a pixel of the reduced image as a grey above 0
        covered = covered.resize(picture.size, Image.Resampling.BOX).point(lambda level: 255 if level else 0)
        picture = Image.fromarray(outline(np.asarray(picture), np.asarray(covered) > 0, CYAN))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"), *picture.size
