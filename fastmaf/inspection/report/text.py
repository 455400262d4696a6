"""Formatting of texts and numbers on the page."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastmaf.images.names import visible
from fastmaf.io.wording import count


def finalize(value: Any) -> Any:
    """Jinja's finalize: passes every text through ``visible``, except markup."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """Formats a number: thousands separators, a typographic minus, words for NaN and infinities, a dash for None."""
    if value is None:
        return "\u2013"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "\u2212infinite"
    plus = "+" if sign else ""
    text = f"{value:{plus},.{digits}f}" if abs(value) < 1e7 else f"{value:{plus}.3g}"
    return text.replace("-", "\u2212")


def interval(ends: tuple[float, float] | None, digits: int = 3, sign: bool = False) -> str:
    """Formats an interval, "0.901 to 0.987"; a dash for None."""
    return number(None) if ends is None else f"{number(ends[0], digits, sign)} to {number(ends[1], digits, sign)}"


def percent(share: float | None) -> str:
    """Formats a share in 0..1, "4.3%"; a dash for None, words for NaN and infinities."""
    return number(share) if share is None or not math.isfinite(share) else f"{share:.1%}"


def images(n: int, kind: str = "") -> str:
    """Formats a number of images: "1 good image", "23 good images", "no good images"."""
    text = count(n, f"{kind} image".lstrip())
    return text if n else text.replace("0", "no", 1)


def score_digits(scores: np.ndarray) -> int:
    """Returns the decimals of anomaly scores such that their interquartile range has three digits."""
    finite = scores[np.isfinite(scores)]
    width = float(np.subtract(*np.quantile(finite, [0.75, 0.25]))) if len(finite) else 0.0
    return 2 if width == 0 else min(max(2 - math.floor(math.log10(width)), 0), 6)
