"""Histograms of scores with a bin at the edge for outliers, above a row of points for each class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fastmaf.images.names import visible
from fastmaf.metrics.drawing import BLUE, GREEN, ORANGE, PURPLE, SHADE, ink, tick_text
from fastmaf.metrics.results import NORMAL

_BINS = 32


class Group(NamedTuple):
    """The scores of one group of images, and how they are drawn."""

    name: str
    scores: np.ndarray
    colour: str
    style: Any = "-"


class Beyond(NamedTuple):
    """An edge bin of a histogram: its centre, and the scores ``side`` ("below" or "above") ``limit``."""

    side: str
    limit: float
    centre: float
    scores: np.ndarray

    @property
    def furthest(self) -> float:
        """The score that is furthest from the bulk."""
        return float(self.scores.min() if self.side == "below" else self.scores.max())


def class_groups(scores: np.ndarray, labels: Sequence[str]) -> tuple[list[Group], list[Group]]:
    """Returns good and defective images, if any, as groups, and each class as a row of points, "good" first."""
    classes = np.asarray(labels)
    good = Group("good", scores[classes == NORMAL], BLUE)
    defective = Group("defective", scores[classes != NORMAL], ORANGE, "--")
    names = sorted(set(labels), key=lambda name: (name != NORMAL, name))
    rows = [Group(_short(name), scores[classes == name], BLUE if name == NORMAL else ORANGE) for name in names]
    return [group for group in (good, defective) if len(group.scores)], rows


class ScoreAxis:
    """The axis of a score histogram: bins over the bulk, and one wide edge bin for all scores below or above it.

    Attributes:
        low, high: limits of the bulk.
        width: width of its bins.
        left, right: centres of the edge bins, which are three bins wide and one bin away from the bulk.
        edges: edges of all bins, those of the edge bins in use included.
        beyond: the edge bins in use.
    """

    def __init__(self, groups: Sequence[Group], thresholds: Iterable[float]) -> None:
        scores = np.concatenate([group.scores for group in groups])
        normal = np.concatenate([np.full(len(group.scores), group.colour != ORANGE) for group in groups])
        self.low, self.high = _bulk_limits(scores, normal, thresholds)
        bulk = np.linspace(self.low, self.high, _BINS + 1)
        self.width = w = float(bulk[1] - bulk[0])
        self.left, self.right = self.low - 2.5 * w, self.high + 2.5 * w
        below = Beyond("below", self.low, self.left, scores[scores < self.low])
        above = Beyond("above", self.high, self.right, scores[scores > self.high])
        self.beyond = [edge for edge in (below, above) if len(edge.scores)]
        spans = [(edge.centre - 1.5 * w, edge.centre + 1.5 * w) for edge in self.beyond]
        self.edges = np.sort(np.append(bulk, spans))

    def draw(
        self, bars: Axes, points: Axes, groups: Iterable[Group], rows: Sequence[Group], thresholds: Mapping[str, float]
    ) -> None:
        """Draws the histogram onto ``bars`` and the points onto ``points``, with a line at each threshold, by label."""
        self._draw_shares(bars, groups)
        self._draw_points(points, rows)
        for axes in (bars, points):
            for edge in self.beyond:
                half = 1.5 * self.width
                axes.axvspan(edge.centre - half, edge.centre + half, color=SHADE, zorder=0, linewidth=0)
            styles = cycle(((ink(), "--"), (GREEN, "-."), (PURPLE, ":")))
            for (label, value), (colour, style) in zip(thresholds.items(), styles, strict=False):
                at = min(max(value, float(self.edges[0])), float(self.edges[-1]))
                axes.axvline(at, color=colour, linestyle=style, label=label)
        bars.set(ylabel="share of the group (%)", ylim=(0, bars.get_ylim()[1] * 1.03))
        bars.tick_params(bottom=False)
        points.tick_params(left=False)
        ticks = [t for t in MaxNLocator(6).tick_values(self.low, self.high) if self.has(t)]
        points.set_xticks(ticks, [tick_text(round(t, 10)) for t in ticks])
        points.set_xlim(self.edges[0], self.edges[-1])

    def has(self, score: float) -> bool:
        """Returns whether a score is within the bulk."""
        return self.low <= score <= self.high

    def _draw_shares(self, axes: Axes, groups: Iterable[Group]) -> None:
        """Draws the histogram of each group, as shares of the group in percent, as groups differ in size."""
        for name, scores, colour, style in groups:
            share = np.histogram(self._place(scores), self.edges)[0] * (100 / len(scores))
            share[share == 0] = math.nan  # no outline along the axis where there are no images
            axes.stairs(share, self.edges, fill=True, color=colour, alpha=0.25)
            label = f"{name} (n = {len(scores)})"
            axes.stairs(share, self.edges, color=colour, linewidth=1.5, linestyle=style, label=label)

    def _draw_points(self, axes: Axes, rows: Sequence[Group]) -> None:
        """Draws a row of points for each group, with a bar at its median; points in the edge bins are triangles."""
        jitter, size = np.random.default_rng(0), rcParams["lines.markersize"]
        for row, (_, scores, colour, _) in enumerate(rows):
            x, y = self._place(scores), row + jitter.uniform(-0.22, 0.22, len(scores))
            scattered = np.where(x == scores, x, x + jitter.uniform(-1.4, 1.4, len(scores)) * self.width)
            for hit, marker in ((x == scores, "o"), (scores > x, ">"), (scores < x, "<")):
                axes.plot(scattered[hit], y[hit], marker, color=colour, alpha=0.6, markeredgewidth=0)
            axes.plot([np.median(x)], [row], "|", color=ink(), markersize=3 * size, markeredgewidth=1.5)
        axes.set_yticks(range(len(rows)), [f"{group.name} ({len(group.scores)})" for group in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)

    def _place(self, scores: np.ndarray) -> np.ndarray:
        """Maps scores to the axis: those beyond the bulk to the centre of their edge bin."""
        return np.where(scores > self.high, self.right, np.where(scores < self.low, self.left, scores))


def _short(name: str) -> str:
    text = visible(name)
    return text if len(text) <= 18 else text[:17] + "\u2026"


def _bulk_limits(scores: np.ndarray, normal: np.ndarray, thresholds: Iterable[float]) -> tuple[float, float]:
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
