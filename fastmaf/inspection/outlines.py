"""Outlines of regions that are visible on dark and on bright images: a bright line with a black one outside of it."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import maximum_filter

WHITE, CYAN = (255, 255, 255), (0, 229, 255)


def outline(image: np.ndarray, region: np.ndarray, colour: tuple[int, int, int] = WHITE, width: int = 1) -> np.ndarray:
    """Returns the image with a region outlined; a new uint8 ``[h, w, 3]``.

    The lines lie outside of the region, whose own pixels stay as they are.

    Args:
        image: uint8 ``[h, w, 3]``.
        region: bool ``[h, w]``.
        colour: of the inner line.
        width: of either line in pixels.

    Example:
        >>> import numpy as np
        >>> image, region = np.full((5, 5, 3), 128, np.uint8), np.eye(5, dtype=bool) & (np.arange(5) == 2)
        >>> outline(image, region)[2, :, 0]
        array([  0, 255, 128, 255,   0], dtype=uint8)
    """
    result = np.array(image)
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if not len(rows):
        return result
    margin = 2 * width
    part = (
        slice(max(0, rows[0] - margin), rows[-1] + margin + 1),
        slice(max(0, columns[0] - margin), columns[-1] + margin + 1),
    )
    inside = region[part].astype(np.uint8)
    near = maximum_filter(inside, 2 * width + 1, mode="constant")
    far = maximum_filter(near, 2 * width + 1, mode="constant")
    result[part][far > near] = 0
    result[part][near > inside] = colour
    return result
