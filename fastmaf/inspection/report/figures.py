"""The figures of the report: training curve, histogram of anomaly scores, ROC. Small enough for a phone.

They are inline SVG: text stays text, and colours follow the page, light or dark.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastmaf.images.names import visible
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.report.content import TestResults
from fastmaf.inspection.report.findings import Verdicts
from fastmaf.inspection.report.text import images, number, score_digits
from fastmaf.metrics.figure_parts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Group,
    ScoreAxis,
    column,
    curve_limits,
    mark_above,
    tick_text,
)
from fastmaf.metrics.results import NORMAL, Evaluation

INK, PAPER, SHADE = "#1A1D21", "#FEFEFE", "#EDEDED"

_NAMES = {BLUE: "blue", ORANGE: "orange", GREEN: "green", GREY: "grey", INK: "ink", PAPER: "paper", SHADE: "shade"}
"""The colours that a figure may use, and the CSS variables of the page that replace them."""

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # the page's font: smaller, sharper, searchable
    "text.parse_math": False,  # a $ in a class name is no formula
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "legend.fontsize": 8.5,
    "axes.linewidth": 0.7,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.edgecolor"), "none"),
    "legend.facecolor": PAPER,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
}


class Drawing(NamedTuple):
    """A figure of the report: the <svg> element, and sentences on values beyond its axes."""

    svg: str
    notes: tuple[str, ...] = ()


@contextmanager
def _drawing() -> Iterator[None]:
    """Sets the style of the page's figures, independent of the user's style."""
    with matplotlib.style.context(["default", _SETTINGS]), warnings.catch_warnings():
        # For example a Chinese class name: the browser has the font that matplotlib lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


@_drawing()
def training_curve(log: Sequence[Mapping[str, float]]) -> Drawing:
    """Draws training and held-out NLL (nats) by step; values far above the bulk are marked at the top.

    Args:
        log: rows with "step", "nll" and "held_out_nll".
    """
    at, train, held_out = (column(log, key) for key in ("step", "nll", "held_out_nll"))
    figure, axes = _figure(4.9, 2.9)
    low, high = curve_limits(train, held_out, np.empty(0))
    notes = []
    marker = "o" if len(log) <= 40 else ""  # a single point has no line
    for name, values, colour, style in (("training", train, BLUE, "-"), ("held-out normals", held_out, ORANGE, "--")):
        if np.isfinite(values).any():
            axes.plot(at, values, style, color=colour, linewidth=1.6, marker=marker, markersize=3.2, label=name)
        above = mark_above(axes, at, values, high, colour)
        if above.any():
            worst = int(np.argmax(np.where(above, values, -np.inf)))
            notes.append(
                f"{name.capitalize()}: {above.sum()} of {len(at)} points are above the axis, up to "
                f"{number(values[worst], 0)} nats at step {at[worst]:.0f}."
            )
    if np.isnan(train).any():
        notes.append(f"Training: no value at {np.isnan(train).sum()} of {len(at)} points.")
    axes.set(xlabel="step", ylabel="mean NLL of an image (nats)", ylim=(low, high))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    if axes.get_legend_handles_labels()[0]:  # outside, where it hides no data
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, borderaxespad=0.2)
    alt = f"Training curve over {len(log)} rows: training NLL {_from_to(train)}"
    if np.isfinite(held_out).any():
        alt += f"; held-out NLL {_from_to(held_out)}, lowest {number(float(np.nanmin(held_out)), 0)} nats"
    return Drawing(_inline_svg(figure, "curve", alt), tuple(notes))


@_drawing()
def score_histogram(calibration: Calibration, test: TestResults | None) -> Drawing:
    """Draws anomaly scores of calibration and test images: shares by group above, every image below."""
    groups, rows = _groups(calibration, test)
    threshold = calibration.threshold
    scores = np.concatenate([group.scores for group in groups])
    normal = np.concatenate([np.full(len(group.scores), group.colour != ORANGE) for group in groups])
    scale = ScoreAxis(scores, normal, [threshold])
    digits = score_digits(scores)
    threshold_text = f"threshold {number(threshold, digits)}"
    figure = Figure(figsize=(4.9, 2.7 + 0.21 * len(rows)), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.3, 0.21 * len(rows) + 0.1])
    scale.draw_shares(upper, _with_sizes(groups))
    scale.draw_points(lower, _with_sizes(rows), ink=INK, size=3.4)
    for axes in (upper, lower):
        for span in scale.beyond:
            axes.axvspan(*span, color=SHADE, zorder=0, linewidth=0)
        axes.axvline(scale.clip(threshold), color=INK, linestyle=(0, (5, 2)), linewidth=1.3, label=threshold_text)
    upper.set(ylabel="share of the group (%)", ylim=(0, upper.get_ylim()[1] * 1.03))
    upper.tick_params(bottom=False)
    lower.tick_params(left=False)
    # across the whole figure: four entries do not fit above the axes alone
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    lower.set(xlabel="anomaly score: the higher, the more anomalous", xlim=(scale.edges[0], scale.edges[-1]))
    ticks = [t for t in MaxNLocator(6).tick_values(scale.low, scale.high) if scale.low <= t <= scale.high]
    lower.set_xticks(ticks, [tick_text(round(t, 10)) for t in ticks])
    medians = (
        f"{group.name}, {images(len(group.scores))}, median {number(float(np.median(group.scores)), digits)}"
        for group in groups
    )
    alt = f"Anomaly scores by group: {'; '.join(medians)}; {threshold_text}"
    notes = _beyond_notes(scale, scores, digits)
    if not scale.low <= threshold <= scale.high:
        notes.append("The threshold lies beyond this axis.")
    return Drawing(_inline_svg(figure, "histogram", alt), tuple(notes))


@_drawing()
def roc(evaluation: Evaluation, counts: Verdicts) -> Drawing:
    """Draws the ROC of the default score, with the point of the chosen threshold."""
    figure, axes = _figure(3.9, 3.8)
    area = f"AUROC {evaluation.auroc:.3f}"
    axes.plot(evaluation.roc.fpr, evaluation.roc.tpr, color=BLUE, linewidth=1.8, label=area, clip_on=False)
    axes.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1, label="chance")
    text = f"{counts.detected} of {counts.defective} defects, {counts.false_alarms} of {counts.good} false alarms"
    point = axes.plot(counts.false_alarms / counts.good, counts.detected / counts.defective, "s", color=INK)
    point[0].set(label=f"chosen threshold:\n{text}", markersize=7, markeredgewidth=0, clip_on=False, zorder=5)
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel=f"false alarms: share of {counts.good} good images",
        ylabel=f"detected: share of {counts.defective} defective images",
        aspect="equal",
    )
    axes.legend(loc="lower right", frameon=True, framealpha=0.85)
    alt = f"ROC of good against defective test images, {area}; at the chosen threshold {text}"
    return Drawing(_inline_svg(figure, "roc", alt))


def _groups(calibration: Calibration, test: TestResults | None) -> tuple[list[Group], list[Group]]:
    """Returns the groups of the histogram and the rows of points beneath it."""
    groups = [Group("calibration", calibration.scores, GREEN, ":")]
    rows = list(groups)
    if test is not None:
        labels = np.asarray(test.labels)
        groups.append(Group("good", test.scores[labels == NORMAL], BLUE, "-"))
        groups.append(Group("defective", test.scores[labels != NORMAL], ORANGE, "--"))
        for label in sorted(set(test.labels), key=lambda name: (name != NORMAL, name)):
            rows.append(Group(_short(label), test.scores[labels == label], BLUE if label == NORMAL else ORANGE))
    return groups, rows


def _with_sizes(groups: Sequence[Group]) -> list[Group]:
    return [group._replace(name=f"{group.name} ({len(group.scores)})") for group in groups]


def _beyond_notes(scale: ScoreAxis, scores: np.ndarray, digits: int) -> list[str]:
    """Returns a sentence on each edge bin of the histogram in use."""
    notes = []
    for side, limit, beyond, furthest in (
        ("below", scale.low, scores < scale.low, scores.min()),
        ("above", scale.high, scores > scale.high, scores.max()),
    ):
        if beyond.any():
            text = f"The grey bin at the edge holds {images(int(beyond.sum()))} {side} {number(limit, digits)}, up to "
            notes.append(f"{text}{number(float(furthest), digits)}.")
    return notes


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _short(name: str) -> str:
    text = visible(name)
    return text if len(text) <= 18 else text[:17] + "\u2026"


def _from_to(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    return f"from {number(float(known[0]), 0)} to {number(float(known[-1]), 0)} nats" if len(known) else "not recorded"


def _inline_svg(figure: Figure, name: str, alt: str) -> str:
    """Returns ``figure`` as an <svg> element, with the alternative text ``alt``.

    ``name`` is unique in the page: ids of clip paths and markers are hashes that depend on it.
    """
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # reproducible bytes
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(text.getvalue())
    for element in root.iter():
        # HTML parsers add the namespace of <svg> themselves, and href needs none since SVG 2.
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        if "_" in attributes.get("id", ""):  # "axes_1": in every figure, and nothing refers to it
            del attributes["id"]
        element.attrib = {key: re.sub("#[0-9a-f]{6}", _variable, value) for key, value in attributes.items()}
    root.attrib = {"class": "figure", "role": "img", "aria-label": alt, "viewBox": root.attrib["viewBox"]}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _variable(colour: re.Match[str]) -> str:
    name = _NAMES.get(colour[0].upper())
    return f"var(--{name})" if name else colour[0]
