"""The figures of a page: training curve, histogram of scores, ROC. Small enough for a phone.

They are inline SVG: text stays text, and colours follow the page, light or dark. The ``name`` of a figure is unique in
its page.
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

from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.report.content import TestResults
from fastmaf.inspection.report.findings import Verdicts
from fastmaf.inspection.report.text import images, number, score_digits
from fastmaf.metrics import drawing
from fastmaf.metrics.histogram import Group, ScoreAxis, class_groups
from fastmaf.metrics.results import Evaluation

INK, PAPER = "#1A1D21", "#FEFEFE"

_NAMES = {getattr(drawing, name.upper()): name for name in ("blue", "orange", "green", "grey", "shade")}
_NAMES |= {INK: "ink", PAPER: "paper"}
"""The colours that a figure may use, and the CSS variables of the page that replace them."""

_SETTINGS: dict[str, Any] = {
    **drawing.SETTINGS,
    "svg.fonttype": "none",  # the page's font: smaller, sharper, searchable
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "legend.fontsize": 8.5,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.4,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.edgecolor"), "none"),
    "legend.facecolor": PAPER,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
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
def training_curve(
    log: Sequence[Mapping[str, Any]], *, by: str = "step", held_out_nll: str = "held_out_nll", name: str = "curve"
) -> Drawing:
    """Draws training and held-out NLL (nats) by step; values far above the bulk are marked at the top.

    Args:
        log: rows with ``by``, "nll" and ``held_out_nll``.
        by: "step" or "epoch".
        held_out_nll: the column of held-out NLLs.
        name: of the figure.
    """
    at, train, held_out = (drawing.column(log, key) for key in (by, "nll", held_out_nll))
    figure, axes = _figure(4.9, 2.9)
    notes = []
    curves = drawing.Curve("training", at, train), drawing.Curve("held-out good images", at, held_out)
    for curve in drawing.draw_curves(axes, *curves):
        worst = int(np.argmax(curve.nll))
        notes.append(
            f"{curve.name.capitalize()}: {len(curve.nll)} of {len(at)} points are above the axis, up to "
            f"{number(curve.nll[worst], 0)} nats at {by} {curve.at[worst]:.0f}."
        )
    if np.isnan(train).any():
        notes.append(f"Training: no value at {np.isnan(train).sum()} of {len(at)} points.")
    axes.set_xlabel(by)
    drawing.legend_above(axes)
    alt = f"Training curve over {len(log)} rows: training NLL {_from_to(train)}"
    if np.isfinite(held_out).any():
        alt += f"; held-out NLL {_from_to(held_out)}, lowest {number(float(np.nanmin(held_out)), 0)} nats"
    return Drawing(_inline_svg(figure, name, alt), tuple(notes))


def score_histogram(calibration: Calibration, test: TestResults | None) -> Drawing:
    """Draws anomaly scores of calibration and test images: shares by group above, every image below."""
    groups = [Group("calibration", calibration.scores, drawing.GREEN, ":")]
    rows = list(groups)
    if test is not None:
        by_kind, by_class = class_groups(test.scores, test.labels)
        groups, rows = groups + by_kind, rows + by_class
    return _histogram("histogram", "anomaly score", groups, rows, {"threshold": calibration.threshold})


def nll_histogram(nll: np.ndarray, labels: Sequence[str], thresholds: Mapping[str, float], *, name: str) -> Drawing:
    """Draws the NLLs (nats) of test images as ``score_histogram`` does, with a line at each threshold."""
    return _histogram(name, "NLL in nats", *class_groups(nll, labels), thresholds)


@_drawing()
def _histogram(
    name: str, quantity: str, groups: Sequence[Group], rows: Sequence[Group], thresholds: Mapping[str, float]
) -> Drawing:
    scale = ScoreAxis(groups, thresholds.values())
    digits = score_digits(np.concatenate([group.scores for group in groups]))
    lines = {f"{label} {number(value, digits)}": value for label, value in thresholds.items()}
    figure = Figure(figsize=(4.9, 2.7 + 0.21 * len(rows)), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.3, 0.21 * len(rows) + 0.1])
    scale.draw(upper, lower, groups, rows, lines)
    # across the whole figure: four entries do not fit above the axes alone
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    lower.set_xlabel(f"{quantity}: the higher, the more anomalous")
    medians = (
        f"{group.name}, {images(len(group.scores))}, median {number(float(np.median(group.scores)), digits)}"
        for group in groups
    )
    alt = f"{quantity[0].upper()}{quantity[1:]} by group: {'; '.join([*medians, *lines])}"
    notes = [
        f"The grey bin at the edge holds {images(len(edge.scores))} {edge.side} {number(edge.limit, digits)}, up to "
        f"{number(edge.furthest, digits)}."
        for edge in scale.beyond
    ]
    beyond = [label for label, value in thresholds.items() if not scale.has(value)]
    notes += [f"The {label} lies beyond this axis." for label in beyond]
    return Drawing(_inline_svg(figure, name, alt), tuple(notes))


@_drawing()
def roc(evaluation: Evaluation, points: Mapping[str, Verdicts], *, name: str = "roc") -> Drawing:
    """Draws an ROC with the points of one or two thresholds, by label."""
    figure, axes = _figure(3.9, 3.8)
    area = f"AUROC {evaluation.auroc:.3f}"
    texts = {label: f"{label}:\n{verdicts.describe()}" for label, verdicts in points.items()}
    rates = [(v.false_alarms / v.good, v.detected / v.defective, texts[label]) for label, v in points.items()]
    drawing.draw_roc(axes, evaluation, area, rates)
    at = "; ".join(f"at the {label} {verdicts.describe()}" for label, verdicts in points.items())
    return Drawing(_inline_svg(figure, name, f"ROC of good against defective test images, {area}; {at}"))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


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
