"""Parts that figures of NLLs and scores share: colours, limits that outliers do not stretch, histograms with edge bins.

An axis covers the bulk of the values. Values beyond it are marked at its edge: a single image at 4e5 nats must not
compress all others, near -4e4, into one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

# Okabe-Ito: distinguishable with any colour vision. Groups also differ in line style or marker.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#8B4A83", "#666666"
_BINS = 32


class Group(NamedTuple):
    """The scores of one group of images, and how they are drawn."""

    name: str
    scores: np.ndarray
    colour: str
    style: Any = "-"


class ScoreAxis:
    """The axis of a score histogram: bins over the bulk, and one wide edge bin for all scores below or above it.

    Attributes:
        low, high: limits of the bulk.
        width: width of its bins.
        left, right: centres of the edge bins, which are three bins wide and one bin away from the bulk.
        edges: edges of all bins, those of the edge bins in use included.
        beyond: (start, end) of each edge bin in use.
    """

    def __init__(self, scores: np.ndarray, normal: np.ndarray, thresholds: Iterable[float] = ()) -> None:
        self.low, self.high = hist_limits(scores, normal, thresholds)
        bulk = np.linspace(self.low, self.high, _BINS + 1)
        self.width = w = float(bulk[1] - bulk[0])
        self.left, self.right = self.low - 2.5 * w, self.high + 2.5 * w
        before = [self.left - 1.5 * w, self.left + 1.5 * w] if (scores < self.low).any() else []
        after = [self.right - 1.5 * w, self.right + 1.5 * w] if (scores > self.high).any() else []
        self.edges = np.concatenate([before, bulk, after])
        self.beyond = [(span[0], span[1]) for span in (before, after) if span]

    def place(self, scores: np.ndarray) -> np.ndarray:
        """Maps scores to the axis: those beyond the bulk to the centre of their edge bin."""
        return np.where(scores > self.high, self.right, np.where(scores < self.low, self.left, scores))

    def clip(self, score: float) -> float:
        """Returns where a line at this score is drawn: within the axis."""
        return min(max(score, float(self.edges[0])), float(self.edges[-1]))

    def draw_shares(self, axes: Axes, groups: Iterable[Group]) -> None:
        """Draws the histogram of each non-empty group, as shares of the group in percent."""
        for name, scores, colour, style in groups:
            share = np.histogram(self.place(scores), self.edges)[0] * (100 / len(scores))
            share[share == 0] = math.nan  # no outline along the axis where there are no images
            axes.stairs(share, self.edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(share, self.edges, color=colour, linewidth=1.5, linestyle=style, label=name)

    def draw_points(self, axes: Axes, rows: Sequence[Group], *, ink: str = "black", size: float = 4.5) -> None:
        """Draws a row of points for each group, with a bar at its median; points in the edge bins are triangles."""
        jitter = np.random.default_rng(0)
        for row, (_, scores, colour, _) in enumerate(rows):
            x, y = self.place(scores), row + jitter.uniform(-0.22, 0.22, len(scores))
            scattered = np.where(x == scores, x, x + jitter.uniform(-1.4, 1.4, len(scores)) * self.width)
            for hit, marker in ((x == scores, "o"), (scores > x, ">"), (scores < x, "<")):
                axes.plot(scattered[hit], y[hit], marker, color=colour, markersize=size, alpha=0.6, markeredgewidth=0)
            axes.plot([np.median(x)], [row], "|", color=ink, markersize=3 * size, markeredgewidth=1.5)
        axes.set_yticks(range(len(rows)), [group.name for group in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)


def hist_limits(scores: np.ndarray, normal: np.ndarray, thresholds: Iterable[float]) -> tuple[float, float]:
    """Returns the limits of the bulk: whiskers of normals and defects, the latter at most 10 normal IQRs away.

    Args:
        scores: [n] scores; infinities are ignored.
        normal: bool [n], which of them are normal.
        thresholds: scores to include where they are near the bulk.
    """
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return 0.0, 1.0
    base = scores[normal & np.isfinite(scores)]
    base = base if len(base) >= 2 else finite
    q25, q50, q75 = np.quantile(base, [0.25, 0.5, 0.75])
    spread = float(q75 - q25) or float(np.quantile(np.abs(finite - q50), 0.5)) or max(1.0, 0.01 * abs(float(q50)))
    fence_low, fence_high = q50 - 10 * spread, q50 + 10 * spread
    low, high = max(base.min(), q25 - 3 * spread), min(base.max(), q75 + 3 * spread)
    others = scores[~normal & np.isfinite(scores)]
    if len(others):
        o25, o75 = np.quantile(others, [0.25, 0.75])
        reach = 1.5 * (o75 - o25)
        near = others[(others >= max(fence_low, o25 - reach)) & (others <= min(fence_high, o75 + reach))]
        if len(near):
            low, high = min(low, near.min()), max(high, near.max())
    near_thresholds = [t for t in thresholds if fence_low <= t <= fence_high]
    low, high = min([low, *near_thresholds]), max([high, *near_thresholds])
    margin = 0.03 * (high - low) or spread
    return float(low - margin), float(high + margin)


def curve_limits(train: np.ndarray, validation: np.ndarray, published: np.ndarray) -> tuple[float, float]:
    """Returns the limits of an NLL axis: all low values, and high ones that are not far above the bulk."""
    low, high = _bulk(np.concatenate([train, published]) if np.isfinite(train).any() else validation)
    val_low, val_high = _bulk(validation)
    low = min(low, val_low)
    span = max(high - low, 0.1 * abs(low))
    if high < val_high <= low + 3 * span:  # a validation curve may not flatten the training curve
        high = val_high
    if not math.isfinite(low):
        return 0.0, 1.0
    margin = 0.04 * (high - low) or max(1.0, 0.05 * abs(low))
    return low - margin, high + margin


def _bulk(values: np.ndarray) -> tuple[float, float]:
    """Returns the lowest value, and the highest within twelve times the lower half's spread of the median."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.inf, -math.inf
    median = float(np.median(values))
    spread = median - float(np.quantile(values, 0.05))
    return float(values.min()), float(values[values <= median + 12 * spread].max())


def mark_above(axes: Axes, at: np.ndarray, values: np.ndarray, limit: float, colour: str) -> np.ndarray:
    """Marks values above the limit of a curve's axis with triangles at its upper edge; returns which those are."""
    above = values > limit
    if above.any():
        y = np.full(int(above.sum()), 0.985)
        axes.plot(at[above], y, "^", color=colour, markersize=6.5, transform=axes.get_xaxis_transform())
    return above


def column(log: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """Returns a column of a log as float64 [rows], NaN where a row has no such number."""
    return np.array([math.nan if row.get(key) in (None, "") else float(row[key]) for row in log], dtype=np.float64)


def tick_text(value: float, _position: int | None = None) -> str:
    """Formats a tick of an axis, with a typographic minus."""
    text = f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:g}"
    return with_minus(text if abs(value) < 1e7 else f"{value:.2g}")


def with_minus(text: str) -> str:
    """Replaces hyphens by typographic minus signs."""
    return text.replace("-", "\u2212")
