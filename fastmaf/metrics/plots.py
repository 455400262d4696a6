"""Figures as PNG files: NLL curves, histograms and ROC curves.

Only matplotlib's object API is used: no pyplot, no global state, no display. Each function draws on a light background
whatever the user's style is, writes its PNG atomically and returns the Figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastmaf.images.listing import count
from fastmaf.images.names import visible
from fastmaf.io.atomic import written_atomically
from fastmaf.io.marks import CURVE, HISTOGRAM, KEYWORD, ROC
from fastmaf.metrics.figure_parts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    Group,
    ScoreAxis,
    column,
    curve_limits,
    mark_above,
    tick_text,
    with_minus,
)
from fastmaf.metrics.results import NORMAL, Evaluation, nats

_DPI = 120
_THRESHOLD_STYLES = (("black", "--"), (GREEN, "-."), (PURPLE, ":"))


@matplotlib.style.context("default")
def nll_curve(
    path: str | Path, log: Sequence[Mapping[str, Any]], published: Mapping[int, float] | None = None
) -> Figure:
    """Draws training and validation NLL by epoch.

    Args:
        path: the PNG to write.
        log: one row per epoch with "epoch", "nll" and, where known, "val_nll" and "bits_per_dim" (None or NaN if not).
        published: NLL of the published run by epoch, drawn as markers up to the last epoch of the log.
    """
    figure, axes = _figure(8.0, 5.2)
    figure.suptitle("Negative log-likelihood by epoch", fontsize=12)
    axes.set(xlabel="epoch", ylabel="mean NLL of an image (nats)")
    if not log:
        axes.text(0.5, 0.5, "no epoch finished yet", ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return _saved(figure, path, CURVE)
    epochs, train, validation = (column(log, key) for key in ("epoch", "nll", "val_nll"))
    last = float(np.nanmax(epochs))
    markers = {e: v for e, v in sorted((published or {}).items()) if e <= last}
    marked, values = np.array(list(markers), dtype=float), np.array(list(markers.values()), dtype=float)
    low, high = curve_limits(train, validation, values)
    known = ~np.isnan(validation)
    dot: dict[str, Any] = {"marker": "o", "markersize": 4.0} if len(log) <= 40 else {}  # a single point has no line
    curves: list[tuple[str, np.ndarray, np.ndarray, dict[str, Any]]] = [
        ("training", epochs, train, {"color": BLUE, "linewidth": 1.8, **dot}),
        ("validation", epochs[known], validation[known], {"color": ORANGE, "linewidth": 1.5, "ls": "--", **dot}),
        ("published run", marked, values, {"color": "black", "marker": "D", "mfc": "white", "markersize": 6, "ls": ""}),
    ]
    for name, at, nll, style in curves:
        if len(at):
            axes.plot(at, nll, label=name, **style)
    above = []
    for name, at, nll, style in curves:
        out = mark_above(axes, at, nll, high, style["color"])
        if out.any():
            above.append(f"{name} " + _few(at[out], nll[out]))
    if above:
        axes.plot([], [], "^", color=GREY, markersize=7, label="above the axis: " + "\n".join(above))
    gaps = epochs[np.isnan(train)]
    if len(gaps):
        text = ", ".join(f"{e:.0f}" for e in gaps[:6]) + (", ..." if len(gaps) > 6 else "")
        axes.plot([], [], label=f"no training NLL (not a number) at epoch {text}", linestyle="none")
    axes.set_ylim(low, high)
    axes.set_xlim(min(0.0, float(np.nanmin(epochs)) - 1), last + max(0.5, 0.02 * last))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    _bits_axis(axes, log, train)
    _legend_above(axes)
    return _saved(figure, path, CURVE)


@matplotlib.style.context("default")
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
    normal = classes == NORMAL
    scale = ScoreAxis(nll, normal, thresholds.values())
    groups = [
        Group(f"good (n = {normal.sum()})", nll[normal], BLUE),
        Group(f"defective (n = {(~normal).sum()})", nll[~normal], ORANGE, (0, (4, 1.2))),
    ]
    names = sorted(set(classes.tolist()), key=lambda name: (name != NORMAL, name))
    rows = [
        Group(f"{_plain(name)} ({(classes == name).sum()})", nll[classes == name], BLUE if name == NORMAL else ORANGE)
        for name in names
    ]
    figure = Figure(figsize=(9.0, 5.0 + 0.35 * len(rows)), dpi=_DPI, facecolor="white", layout="constrained")
    bars, points = figure.subplots(2, 1, sharex=True, height_ratios=[3.6, 0.35 * len(rows) + 0.3])
    figure.suptitle("NLL of good and defective images", fontsize=12)
    scale.draw_shares(bars, [group for group in groups if len(group.scores)])
    scale.draw_points(points, rows)
    for axes in (bars, points):
        for span in scale.beyond:
            axes.axvspan(*span, color="#EEEEEE", zorder=0, linewidth=0)
        for (name, value), (colour, style) in zip(thresholds.items(), cycle(_THRESHOLD_STYLES), strict=False):
            where = "" if scale.low <= value <= scale.high else ", beyond this axis"
            label = f"threshold {_plain(name)}: {with_minus(nats(value))} nats{where}"
            axes.axvline(scale.clip(value), color=colour, linestyle=style, linewidth=1.6, label=label)
    bars.set(ylabel="share of the group (%)", ylim=(0, bars.get_ylim()[1] * 1.03))
    _legend_above(bars)
    points.set(ylabel="class (images)\nbar: median", xlim=(scale.edges[0], scale.edges[-1]))
    points.grid(axis="x", alpha=0.25, linewidth=0.7)
    points.spines[["right"]].set_visible(False)
    points.set_xlabel("NLL of an image (nats): the higher, the more anomalous")
    ticks = {t: tick_text(t) for t in MaxNLocator(7).tick_values(scale.low, scale.high) if scale.low <= t <= scale.high}
    if (nll < scale.low).any():
        ticks[scale.left] = _edge_text(f"below {tick_text(scale.low)}\ndown to", nll[nll < scale.low], np.min)
    if (nll > scale.high).any():
        ticks[scale.right] = _edge_text(f"above {tick_text(scale.high)}\nup to", nll[nll > scale.high], np.max)
    points.set_xticks(list(ticks), list(ticks.values()))
    return _saved(figure, path, HISTOGRAM)


def _edge_text(where: str, nll: np.ndarray, furthest: Callable[[np.ndarray], float]) -> str:
    """Labels the bin at an edge with the number of its images and the furthest of their NLLs."""
    finite = nll[np.isfinite(nll)]
    infinite = len(nll) - len(finite)
    text = with_minus(nats(furthest(finite))) if len(finite) else "infinity"
    note = f"\n({infinite} infinite)" if infinite and len(finite) else ""
    return f"{count(len(nll), 'image')}\n{where} {text}{note}"


@matplotlib.style.context("default")
def roc_curve(path: str | Path, evaluation: Evaluation) -> Figure:
    """Draws the ROC of an evaluation, its AUROC with interval, and both operating points."""
    figure, axes = _figure(6.0, 6.0)
    label = f"AUROC {evaluation.auroc:.3f}"
    if evaluation.auroc_interval is not None:
        label += " (95% interval {:.3f} to {:.3f})".format(*evaluation.auroc_interval)
    roc = evaluation.roc
    axes.plot(roc.fpr, roc.tpr, color=BLUE, linewidth=2, label=label)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="chance")
    for report, marker, colour, name in (
        (evaluation.youden, "o", "black", "Youden (chosen on the test labels)"),
        (evaluation.held_out, "s", GREEN, "held-out normals (no test labels)"),
    ):
        if report is None:
            continue
        text = f"{name}:\n{with_minus(nats(report.threshold))} nats, {report.false_alarm_rate:.0%} false alarms, "
        text += f"{report.anomaly.recall:.0%} of defects found"
        axes.plot(
            [report.false_alarm_rate], [report.anomaly.recall], marker, color=colour, markersize=9, label=text,
            markeredgecolor="white", linestyle="none", clip_on=False, zorder=5,
        )  # fmt: skip
    axes.set(
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
        xlabel=f"false-alarm rate: share of {evaluation.n_normal} normals called anomalous",
        ylabel=f"detection rate: share of {evaluation.n_anomalous} defects called anomalous",
        title="ROC: good against defective images",
    )
    axes.set_aspect("equal")
    axes.legend(loc="lower right", fontsize=8.5, framealpha=0.9)
    return _saved(figure, path, ROC)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    return figure, figure.add_subplot()


def _legend_above(axes: Axes) -> None:
    """Puts the legend between title and axes, where it hides no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, fontsize=9, frameon=False, borderaxespad=0.2)


def _saved(figure: Figure, path: str | Path, role: str) -> Figure:
    for axes in figure.axes:
        axes.spines[["top"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.axes[0].grid(alpha=0.25, linewidth=0.7)
    with written_atomically(path) as file:
        figure.savefig(file, format="png", dpi=_DPI, facecolor="white", metadata={KEYWORD: role})
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


def _few(at: np.ndarray, values: np.ndarray) -> str:
    if len(at) <= 3:
        return ", ".join(f"{with_minus(nats(v))} at epoch {e:.0f}" for e, v in zip(at, values, strict=True))
    top = int(np.argmax(values))
    return f"in {len(at)} epochs, most at epoch {at[top]:.0f}: {with_minus(nats(values[top]))}"


def _plain(text: str) -> str:
    """Escapes text from users: a lone $ or a byte that is no UTF-8 must not stop a figure."""
    return visible(text).replace("$", r"\$")
