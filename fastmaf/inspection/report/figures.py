"""The figures of the page: training curve, histogram of anomaly scores, ROC. Drawn small, so that a phone shows them.

The colours, and the guards that keep one blown-up score from flattening all others, are those of
`fastmaf.metrics.figure_parts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastmaf.images.names import visible
from fastmaf.inspection.report.content import Outcome, Threshold, TrainingPoint
from fastmaf.inspection.report.findings import Verdicts
from fastmaf.inspection.report.svg import INK, SHADE, drawing, inline_svg
from fastmaf.inspection.report.text import images, number, score_digits
from fastmaf.metrics.figure_parts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    column,
    curve_limits,
    hist_limits,
    tick_text,
)
from fastmaf.metrics.results import NORMAL, Evaluation

_BINS = 32


@dataclass(frozen=True)
class Drawing:
    """A figure for the page: the <svg> element, and sentences on what does not fit its axes."""

    svg: str
    notes: tuple[str, ...] = ()


def training_curve(points: tuple[TrainingPoint, ...], unit: str) -> Drawing:
    """Training and held-out NLL (nats) by epoch or step; points far above the bulk are marked at the upper edge."""
    log = [{"at": p.at, "nll": p.nll, "val_nll": p.val_nll} for p in points]
    at, train, held_out = (column(log, key) for key in ("at", "nll", "val_nll"))
    with drawing():
        figure, axes = _figure(4.9, 2.9)
        low, high = curve_limits(train, held_out, np.empty(0))
        notes = []
        dot = "o" if len(points) <= 40 else ""  # a single point has no line
        for name, values, colour, style in (
            ("training", train, BLUE, "-"),
            ("held-out normals", held_out, ORANGE, "--"),
        ):
            if np.isfinite(values).any():
                axes.plot(
                    at, values, color=colour, linestyle=style, linewidth=1.6, marker=dot, markersize=3.2, label=name
                )
            out = values > high
            if out.any():
                y = np.full(int(out.sum()), 0.985)
                axes.plot(at[out], y, "^", color=colour, markersize=6, transform=axes.get_xaxis_transform())
                worst = int(np.argmax(np.where(out, values, -np.inf)))
                notes.append(
                    f"{name.capitalize()}: above the axis {out.sum()} of {len(at)} points, as far as "
                    f"{number(values[worst], 0)} nats at {unit} {at[worst]:.0f}."
                )
        if np.isnan(train).any():
            notes.append(f"Training: no number at {int(np.isnan(train).sum())} of {len(at)} points.")
        axes.set_ylim(low, high)
        axes.set(xlabel=unit, ylabel="mean NLL of an image (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
        if axes.get_legend_handles_labels()[0]:  # outside, where it hides no data
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, borderaxespad=0.2)
        alt = f"Training curve over {len(points)} rows by {unit}: training NLL {_from_to(train)}"
        if np.isfinite(held_out).any():
            alt += f"; held-out NLL {_from_to(held_out)}, lowest {number(float(np.nanmin(held_out)), 0)} nats"
        return Drawing(inline_svg(figure, "curve", alt), tuple(notes))


def score_histogram(outcome: Outcome | None, threshold: Threshold | None) -> Drawing:
    """Anomaly scores of the calibration normals and of the test images: shares by group above, every image below."""
    groups, rows = _groups(outcome, threshold)
    scores = np.concatenate([group.scores for group in groups])
    normal = np.concatenate([np.full(len(group.scores), group.colour in (GREEN, BLUE)) for group in groups])
    limit = [] if threshold is None else [threshold.value]
    low, high = hist_limits(scores, normal, limit)
    scale = _Scale(low, high, bool((scores < low).any()), bool((scores > high).any()))
    with drawing():
        figure = Figure(figsize=(4.9, 2.7 + 0.21 * len(rows)), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.3, 0.21 * len(rows) + 0.1])
        for name, values, colour, style in groups:
            share = np.histogram(scale.place(values), scale.edges)[0] * (100 / len(values))
            share[share == 0] = np.nan  # no outline along the axis where there are no images
            upper.stairs(share, scale.edges, fill=True, color=colour, alpha=0.22)
            label = f"{name} ({len(values)})"
            upper.stairs(share, scale.edges, color=colour, linewidth=1.4, linestyle=style, label=label)
        _strips(lower, rows, scale)
        digits = score_digits(scores)
        for axes in (upper, lower):
            for span in scale.beyond:
                axes.axvspan(*span, color=SHADE, zorder=0, linewidth=0)
            if threshold is not None:
                where = min(max(threshold.value, scale.edges[0]), scale.edges[-1])
                label = f"threshold {number(threshold.value, digits)}"
                axes.axvline(where, color=INK, linestyle=(0, (5, 2)), linewidth=1.3, label=label)
            _plain_axes(axes)
        upper.set(ylabel="share of the group (%)", ylim=(0, upper.get_ylim()[1] * 1.03))
        upper.tick_params(bottom=False)
        # beside the axes' labels too: above the axes alone four entries have no room
        figure.legend(*upper.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
        lower.set(xlabel="anomaly score: the higher, the more anomalous", xlim=(scale.edges[0], scale.edges[-1]))
        ticks = [t for t in MaxNLocator(6).tick_values(low, high) if low <= t <= high]
        lower.set_xticks(ticks, [tick_text(round(t, 10)) for t in ticks])
        alt = "Anomaly scores by group: " + "; ".join(
            f"{name}, {images(len(values))}, median {number(float(np.median(values)), digits)}"
            for name, values, _, _ in groups
        )
        if threshold is not None:
            alt += f"; threshold {number(threshold.value, digits)}"
        notes = scale.notes(scores, digits)
        if threshold is not None and not low <= threshold.value <= high:
            notes += ("The threshold lies beyond this axis.",)
        return Drawing(inline_svg(figure, "histogram", alt), notes)


def roc(evaluation: Evaluation, counts: Verdicts) -> Drawing:
    """The ROC of the default score, with the point of the chosen threshold where there is one."""
    with drawing():
        figure, axes = _figure(3.9, 3.8)
        area = f"AUROC {evaluation.auroc:.3f}"
        axes.plot(evaluation.roc.fpr, evaluation.roc.tpr, color=BLUE, linewidth=1.8, label=area, clip_on=False)
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="chance")
        alt = f"ROC of good against defective test images, {area}"
        if counts.false_alarms is not None and counts.detected is not None:
            text = (
                f"{counts.detected} of {counts.defective} defects, {counts.false_alarms} of {counts.good} false alarms"
            )
            point = [counts.false_alarms / counts.good], [counts.detected / counts.defective]
            axes.plot(
                *point, "s", color=INK, markersize=7, label=f"chosen threshold:\n{text}", linestyle="none",
                markeredgewidth=0, clip_on=False, zorder=5,
            )  # fmt: skip
            alt += f"; at the chosen threshold {text}"
        axes.set(
            xlim=(0, 1),
            ylim=(0, 1),
            xlabel=f"false alarms: share of {counts.good} good images",
            ylabel=f"detected: share of {counts.defective} defective images",
        )
        axes.set_aspect("equal")
        axes.legend(loc="lower right", frameon=True, framealpha=0.85)
        return Drawing(inline_svg(figure, "roc", alt))


class _Group(NamedTuple):
    name: str
    scores: np.ndarray
    colour: str
    style: str


def _groups(outcome: Outcome | None, threshold: Threshold | None) -> tuple[list[_Group], list[_Group]]:
    """The groups of the histogram and the rows of points beneath it; none is empty."""
    groups = [] if threshold is None else [_Group("calibration", threshold.scores, GREEN, ":")]
    rows = list(groups)
    if outcome is not None and outcome.labels is None:
        groups.append(_Group("test (class unknown)", outcome.scores, PURPLE, "-"))
        rows.append(groups[-1]._replace(name="test"))
    elif outcome is not None and outcome.labels is not None:
        labels = np.asarray(outcome.labels)
        groups.append(_Group("good", outcome.scores[labels == NORMAL], BLUE, "-"))
        groups.append(_Group("defective", outcome.scores[labels != NORMAL], ORANGE, "--"))
        for label in sorted(set(outcome.labels), key=lambda name: (name != NORMAL, name)):
            colour = BLUE if label == NORMAL else ORANGE
            rows.append(_Group(label, outcome.scores[labels == label], colour, "-"))
    return [group for group in groups if len(group.scores)], rows


class _Scale:
    """The axis of anomaly scores: the bulk in bins, and apart from them a wide bin for all below and all above."""

    def __init__(self, low: float, high: float, under: bool, over: bool) -> None:
        self.low, self.high = low, high
        bulk = np.linspace(low, high, _BINS + 1)
        self.width = w = float(bulk[1] - bulk[0])
        self.left, self.right = low - 2.5 * w, high + 2.5 * w
        before, after = [self.left - 1.5 * w, self.left + 1.5 * w], [self.right - 1.5 * w, self.right + 1.5 * w]
        self.edges = np.concatenate([before if under else [], bulk, after if over else []])
        self.beyond = [(a, b) for (a, b), used in ((before, under), (after, over)) if used]

    def place(self, scores: np.ndarray) -> np.ndarray:
        return np.where(scores > self.high, self.right, np.where(scores < self.low, self.left, scores))

    def notes(self, scores: np.ndarray, digits: int) -> tuple[str, ...]:
        out = []
        for side, limit, hit, furthest in (
            ("below", self.low, scores < self.low, scores.min()),
            ("above", self.high, scores > self.high, scores.max()),
        ):
            if hit.any():
                text = f"The grey bin at the edge holds {images(int(hit.sum()))} {side} {number(limit, digits)}, "
                out.append(text + f"as far as {number(float(furthest), digits)}.")
        return tuple(out)


def _strips(axes: Axes, rows: list[_Group], scale: _Scale) -> None:
    """A row of points for each class, a bar at its median; triangles in the bins at the edges."""
    jitter = np.random.default_rng(0)
    for row, (_, values, colour, _) in enumerate(rows):
        x, y = scale.place(values), row + jitter.uniform(-0.22, 0.22, len(values))
        for hit, marker in ((x == values, "o"), (values > x, ">"), (values < x, "<")):
            size = 3.4 if marker == "o" else 4.6
            axes.plot(x[hit], y[hit], marker, color=colour, markersize=size, alpha=0.6, markeredgewidth=0)
        axes.plot([np.median(x)], [row], "|", color=INK, markersize=9, markeredgewidth=1.4)
    axes.set_yticks(range(len(rows)), [f"{_short(name)} ({len(values)})" for name, values, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(left=False)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _plain_axes(axes)
    return figure, axes


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True)


def _short(name: str) -> str:
    text = visible(name)
    return text if len(text) <= 18 else text[:17] + "\u2026"


def _from_to(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    return f"from {number(float(known[0]), 0)} to {number(float(known[-1]), 0)} nats" if len(known) else "not recorded"
