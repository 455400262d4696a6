"""Figures as PNG files: NLL curves, histograms and ROC curves.

Only matplotlib's object API is used: no pyplot, no global state, no display. Each function draws on a light background
whatever the user's style is, writes its PNG atomically and returns the Figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmaf.images.names import visible
from fastmaf.io.atomic import written_atomically
from fastmaf.io.marks import CURVE, HISTOGRAM, KEYWORD, ROC
from fastmaf.io.wording import count
from fastmaf.metrics import drawing
from fastmaf.metrics.drawing import column, with_minus
from fastmaf.metrics.histogram import Beyond, ScoreAxis, class_groups
from fastmaf.metrics.results import Evaluation, ThresholdReport, nats

_SIZES = {"figure.dpi": 120, "lines.linewidth": 1.8, "lines.markersize": 4.5, "legend.fontsize": 9}
_STYLE = matplotlib.style.context(["default", {**drawing.SETTINGS, **_SIZES}])


@_STYLE
def nll_curve(
    path: str | Path, log: Sequence[Mapping[str, Any]], published: Mapping[int, float] | None = None
) -> Figure:
    """Draws training and validation NLL by epoch.

    Args:
        path: the PNG to write.
        log: one row per epoch with "epoch", "nll" and, where known, "val_nll" and "bits_per_dim" (None or NaN if not).
        published: NLL of the published run by epoch, drawn as markers up to the last epoch of the log.
    """
    figure, axes = _figure(8.0, 5.2, "Negative log-likelihood by epoch")
    if not log:
        axes.text(0.5, 0.5, "no epoch finished yet", ha="center", va="center", transform=axes.transAxes)
        axes.set(xlabel="epoch", ylabel="mean NLL of an image (nats)", xticks=[], yticks=[])
        return _saved(figure, path, CURVE)
    epochs, train, validation = (column(log, key) for key in ("epoch", "nll", "val_nll"))
    last = float(np.nanmax(epochs))
    markers = {e: v for e, v in sorted((published or {}).items()) if e <= last}
    marked, values = np.array(list(markers), dtype=float), np.array(list(markers.values()), dtype=float)
    curves = drawing.Curve("training", epochs, train), drawing.Curve("validation", epochs, validation)
    above = drawing.draw_curves(axes, *curves, drawing.Curve("published run", marked, values))
    if above:
        text = "\n".join(f"{curve.name} {_few(curve.at, curve.nll)}" for curve in above)
        axes.plot([], [], "^", color=drawing.GREY, markersize=7, label=f"above the axis: {text}")
    gaps = epochs[np.isnan(train)]
    if len(gaps):
        text = ", ".join(f"{e:.0f}" for e in gaps[:6]) + (", ..." if len(gaps) > 6 else "")
        axes.plot([], [], label=f"no training NLL (not a number) at epoch {text}", linestyle="none")
    axes.set(xlabel="epoch", xlim=(min(0.0, float(np.nanmin(epochs)) - 1), last + max(0.5, 0.02 * last)))
    _bits_axis(axes, log, train)
    drawing.legend_above(axes)
    return _saved(figure, path, CURVE)


@_STYLE
def nll_hist(path: str | Path, nll: np.ndarray, labels: Sequence[str], thresholds: Mapping[str, float]) -> Figure:
    """Draws the NLLs of good and defective images: a histogram above, every image as a point by class below.

    Bars are shares of their group, as groups differ in size. NLLs beyond the bulk are collected in one bin at the edge,
    which is labelled with their number and the furthest of them.

    Args:
        path: the PNG to write.
        nll: [n] in nats; infinities are counted in the bin at the edge.
        labels: n class names; "good" is normal.
        thresholds: name and NLL of each threshold, drawn as vertical lines.
    """
    nll, classes = np.asarray(nll, dtype=np.float64), np.asarray([str(label) for label in labels])
    if nll.ndim != 1 or len(nll) != len(classes) or not len(nll) or np.isnan(nll).any():
        raise ValueError(
            f"a histogram needs one NLL and one label per image and no NaN; found scores of shape {list(nll.shape)}, "
            f"{int(np.isnan(nll).sum())} of them NaN, and {len(classes)} labels"
        )
    groups, rows = class_groups(nll, classes.tolist())
    scale = ScoreAxis(groups, thresholds.values())
    lines = {}
    for name, value in thresholds.items():
        where = "" if scale.has(value) else ", beyond this axis"
        lines[f"threshold {visible(name)}: {with_minus(nats(value))} nats{where}"] = value
    figure = Figure(figsize=(9.0, 5.0 + 0.35 * len(rows)), layout="constrained")
    figure.suptitle("NLL of good and defective images", fontsize=12)
    bars, points = figure.subplots(2, 1, sharex=True, height_ratios=[3.6, 0.35 * len(rows) + 0.3])
    scale.draw(bars, points, groups, rows, lines)
    drawing.legend_above(bars)
    points.set(xlabel="NLL of an image (nats): the higher, the more anomalous", ylabel="class (images)\nbar: median")
    points.set_xticks([edge.centre for edge in scale.beyond], [_edge_text(edge) for edge in scale.beyond], minor=True)
    return _saved(figure, path, HISTOGRAM)


def _edge_text(edge: Beyond) -> str:
    """Labels the bin at an edge with the number of its images and the furthest of their NLLs."""
    finite = np.isfinite(edge.scores)
    infinite = int((~finite).sum())
    text, note = "infinity", ""
    if finite.any():
        text = with_minus(nats(edge._replace(scores=edge.scores[finite]).furthest))
        note = f"\n({infinite} infinite)" if infinite else ""
    limit, way = drawing.tick_text(edge.limit), "down to" if edge.side == "below" else "up to"
    return f"{count(len(finite), 'image')}\n{edge.side} {limit}\n{way} {text}{note}"


@_STYLE
def roc_curve(path: str | Path, evaluation: Evaluation) -> Figure:
    """Draws the ROC of an evaluation, its AUROC with interval, and both operating points."""
    figure, axes = _figure(6.0, 6.0, "ROC: good against defective images")
    label = f"AUROC {evaluation.auroc:.3f}"
    if evaluation.auroc_interval is not None:
        label += " (95% interval {:.3f} to {:.3f})".format(*evaluation.auroc_interval)
    points = [_operating_point("Youden (chosen on the test labels)", evaluation.youden)]
    if evaluation.held_out is not None:
        points.append(_operating_point("held-out good images (no test labels)", evaluation.held_out))
    drawing.draw_roc(axes, evaluation, label, points)
    return _saved(figure, path, ROC)


def _operating_point(name: str, report: ThresholdReport) -> tuple[float, float, str]:
    false_alarms, recall = report.false_alarm_rate, report.anomaly.recall
    text = f"{name}:\n{with_minus(nats(report.threshold))} nats, {false_alarms:.0%} false alarms, "
    return false_alarms, recall, f"{text}{recall:.0%} of defects found"


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure, figure.add_subplot()


def _saved(figure: Figure, path: str | Path, role: str) -> Figure:
    with written_atomically(path) as file:
        figure.savefig(file, format="png", metadata={KEYWORD: role})
    return figure


def _bits_axis(axes: Axes, log: Sequence[Mapping[str, Any]], train: np.ndarray) -> None:
    """Adds a scale in bits per dimension at the right; the factor is the ratio of the log's two columns."""
    bits = column(log, "bits_per_dim")
    usable = np.isfinite(bits) & np.isfinite(train) & (bits != 0) & (train != 0)
    if usable.any():
        factor = float(np.median(bits[usable] / train[usable]))
        right = axes.secondary_yaxis(
            "right", functions=(partial(np.multiply, factor), partial(np.multiply, 1 / factor))
        )
        right.set_ylabel("bits per dimension")
        right.grid(visible=False)


def _few(at: np.ndarray, values: np.ndarray) -> str:
    if len(at) <= 3:
        return ", ".join(f"{with_minus(nats(v))} at epoch {e:.0f}" for e, v in zip(at, values, strict=True))
    top = int(np.argmax(values))
    return f"in {len(at)} epochs, most at epoch {at[top]:.0f}: {with_minus(nats(values[top]))}"
