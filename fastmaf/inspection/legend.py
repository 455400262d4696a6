"""The strip below an overlay: verdict, score and threshold, and the scale of the colours."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

NARROWEST = 256
"""Width in pixels that the texts need."""

_PAPER, _INK, _QUIET = (20, 23, 26), (240, 242, 244), (160, 169, 178)
_ALARM, _PASSED = (245, 160, 106), (95, 211, 174)


def with_legend(
    picture: Image.Image,
    colours: np.ndarray,
    *,
    low: float,
    high: float,
    contour: float | None,
    score: float,
    threshold: float,
) -> Image.Image:
    """Returns the picture with a strip below it; narrow pictures get a margin on the right.

    Args:
        picture: RGB.
        colours: uint8 ``[k, 3]``, those of the values from ``low`` to ``high``.
        low, high: ends of the scale.
        contour: level of the contour, marked on the scale; None if there is no contour.
        score, threshold: of the image, and of the model.
    """
    width = max(picture.width, NARROWEST)
    size = min(max(width // 26, 11), 40)
    font, line = ImageFont.load_default(size), round(1.45 * size)
    edge = size // 2
    result = Image.new("RGB", (width, picture.height + 4 * line + edge), _PAPER)
    result.paste(picture)
    draw, top = ImageDraw.Draw(result), picture.height + edge // 2
    anomalous = score > threshold
    verdict = "anomalous" if anomalous else "good"
    draw.text((edge, top), verdict, _ALARM if anomalous else _PASSED, font)
    relation = "above" if anomalous else "not above"
    text = f"score {score:.4g}, {relation} the threshold {threshold:.4g}"
    draw.text((edge + draw.textlength(verdict + "  ", font), top), text, _INK, font)
    top += line + size // 4
    bar = width - 2 * edge
    index = np.linspace(0, len(colours) - 1, bar).round().astype(int)
    scale = np.broadcast_to(colours[index], (size, bar, 3))
    result.paste(Image.fromarray(np.ascontiguousarray(scale)), (edge, top))
    at = 0.0 if contour is None else min(max((contour - low) / (high - low), 0.0), 1.0)
    if contour is not None:
        x = edge + round(at * (bar - 1))
        draw.line((x, top - 2, x, top + size + 1), (0, 0, 0), 5)
        draw.line((x, top - 2, x, top + size + 1), (255, 255, 255), 2)
    top += size + size // 4
    draw.text((edge, top), f"{low:.3g}", _INK, font)
    draw.text((width - edge, top), f"{high:.3g}, the highest of good images", _INK, font, anchor="ra")
    below = "no region above that" if contour is None else f"contour: map above {contour:.3g}"
    if contour is not None and contour < high:
        below += ", half of the highest here"
    draw.text((edge, top + line), below, _QUIET, font)
    return result
