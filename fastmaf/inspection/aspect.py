"""The aspect ratio of the images of an object, which its model keeps.

Images are read as squares, one tensor for all. Where the good images are not square, a model of pixels reduces the
shorter side, so that it sees the object undistorted: a pixel is as high as it is wide for augmentation, smoothing and
synthetic defects. Its anomaly maps are brought back to the square, in which they cover the whole image as it was read.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

SQUARE = 1.05
"""Images whose longer side is at most this multiple of the shorter one are fitted as squares."""

_LONGEST = 2.0  # sides of the square of the same area: images are read at this size, twice for the augmentation
_SHORTEST = 8  # pixels


def aspect_of(shapes: Sequence[tuple[int, int]]) -> float:
    """Returns the height over the width of images: the median, 1 if it is close to square or there are no images.

    Images of another aspect ratio are resized to it.

    Example:
        >>> from fastmaf.inspection.aspect import aspect_of
        >>> aspect_of([(100, 200), (100, 201), (120, 90)]), aspect_of([(100, 102)])
        (0.5, 1.0)
    """
    if not len(shapes):
        return 1.0
    ratio = statistics.median(height / width for height, width in shapes)
    return ratio if max(ratio, 1 / ratio) > SQUARE else 1.0


def shape_for(size: int, aspect: float, multiple: int = 1) -> tuple[int, int]:
    """Returns height and width of images of about ``size``² pixels; of fewer if they are very long.

    The longer side is at most twice ``size``, the shorter one at least 8 pixels.

    Args:
        size: side of a square image.
        aspect: height over width.
        multiple: of which both sides of an image that is not square are.

    Example:
        >>> from fastmaf.inspection.aspect import shape_for
        >>> shape_for(64, 1.0), shape_for(64, 0.25), shape_for(64, 10.0, 2)
        ((64, 64), (32, 128), (128, 12))
    """
    if aspect == 1:
        return size, size
    ratio = max(aspect, 1 / aspect)
    long = min(math.sqrt(ratio), _LONGEST) * size
    longer, shorter = (max(1, round(side / multiple)) * multiple for side in (long, max(long / ratio, _SHORTEST)))
    return (longer, shorter) if aspect > 1 else (shorter, longer)


def fitted_into(size: int, aspect: float) -> tuple[int, int]:
    """Returns height and width of an image whose longer side is ``size``.

    Example:
        >>> from fastmaf.inspection.aspect import fitted_into
        >>> fitted_into(100, 0.25)
        (25, 100)
    """
    return max(1, round(size * min(aspect, 1.0))), max(1, round(size / max(aspect, 1.0)))


def usable_side(shapes: Sequence[tuple[int, int]]) -> int:
    """Returns the largest ``size`` of a model that no image, of (height, width) in ``shapes``, is enlarged for."""
    aspect = aspect_of(shapes)
    return int(min(map(min, shapes)) * math.sqrt(max(aspect, 1 / aspect)))
