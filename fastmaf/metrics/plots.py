"""Every figure of the capsule workflow.

Matplotlib's object API only: no pyplot, no global state, no display. Each function draws on a light background
whatever the user's style, writes its PNG atomically and returns the Figure. Axes of NLLs are cut to where the bulk
lies, and what is cut off is marked, counted and named: one image at 4e5 nats must not turn the others, near -4e4, into
a single line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastmaf.images.names import visible
from fastmaf.images.png import image_grid, save_png
from fastmaf.io.atomic import written_atomically
from fastmaf.io.marks import CURVE, HISTOGRAM, KEYWORD, ROC
from fastmaf.metrics.results import NORMAL, Evaluation, nats

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "column",
    "curve_limits",
    "hist_limits",
    "image_grid",
    "nll_curve",
    "nll_hist",
    "roc_curve",
    "save_png",
    "tick_text",
]

_DPI = 120
# Okabe-Ito: told apart with any colour vision, and each also differs in line style or marker.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#8B4A83", "#666666"
_THRESHOLD_STYLES = (("black", "--"), (GREEN, "-."), (PURPLE, ":"))


@matplotlib.style.context("default")
def nll_curve(
    path: str | Path, log: Sequence[Mapping[str, Any]], reference: Mapping[int, float] | None = None
) -> Figure:
    """Training and validation NLL by epoch.

    Args:
        path: the PNG to write.
        log: one row per epoch with "epoch", "nll" and, where known, "val_nll" and "bits_per_dim" (None or NaN if not).
        reference: published NLL by epoch, drawn as markers up to the last epoch of the log.
    """
    figure, axes = _figure(8.0, 5.2)
    figure.suptitle("Negative log-likelihood by epoch", fontsize=12)
    axes.set(xlabel="epoch", ylabel="mean NLL of an image (nats)")
    if not log:
        axes.text(0.5, 0.5, "no epoch finished yet", ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        _save(figure, path, CURVE)
        return figure
    epochs = column(log, "epoch")
    train, validation = column(log, "nll"), column(log, "val_nll")
    last = float(np.nanmax(epochs))
    marks = {e: v for e, v in sorted((reference or {}).items()) if e <= last}
    ref_epochs, ref_values = np.array(list(marks), dtype=float), np.array(list(marks.values()), dtype=float)
    low, high = curve_limits(train, validation, ref_values)
    dot: dict[str, Any] = {"marker": "o", "markersize": 4.0} if len(log) <= 40 else {}  # a single point has no line
    axes.plot(epochs, train, color=BLUE, linewidth=1.8, label="training", **dot)
    known = ~np.isnan(validation)
    if known.any():
        axes.plot(
            epochs[known], validation[known], color=ORANGE, linewidth=1.5, linestyle="--", label="validation", **dot
        )
    if marks:
        label = "published reference run"
        axes.plot(ref_epochs, ref_values, "D", color="black", markerfacecolor="white", markersize=6, label=label)
    series = (
        ("training", epochs, train, BLUE),
        ("validation", epochs, validation, ORANGE),
        ("reference", ref_epochs, ref_values, "black"),
    )
    above = []
    for name, at, values, colour in series:
        out = values > high
        if out.any():
            transform = axes.get_xaxis_transform()
            axes.plot(at[out], np.full(out.sum(), 0.985), "^", color=colour, markersize=7, transform=transform)
            above.append(f"{name} " + _few(at[out], values[out]))
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
    _legend_above(axes, 2)
    _save(figure, path, CURVE)
    return figure


@matplotlib.style.context("default")
def nll_hist(
    path: str | Path, nll: np.ndarray, labels: Sequence[str], thresholds: Mapping[str, float], *, strips: bool = True
) -> Figure:
    """NLLs of good and defective images: histogram above, every image as a point by class below.

    The axis covers the bulk around the normals. What lies beyond is gathered in one bin at the edge, which says how
    many images it holds and how far they reach. Bars are shares of their group, since groups differ in size.

    Args:
        path: the PNG to write.
        nll: [n] in nats; infinities are counted in the bin at the edge.
        labels: n class names; "good" is normal.
        thresholds: label to nats, drawn as vertical lines.
        strips: draw the strip of points by class.
    """
    nll, classes = np.asarray(nll, dtype=np.float64), np.asarray([str(label) for label in labels])
    if nll.ndim != 1 or len(nll) != len(classes) or not len(nll) or np.isnan(nll).any():
        raise ValueError(
            f"a histogram needs one NLL and one label per image and no NaN; found scores of shape {list(nll.shape)}, "
            f"{int(np.isnan(nll).sum())} of them NaN, and {len(classes)} labels"
        )
    names = sorted(set(classes.tolist()), key=lambda name: (name != NORMAL, name))
    low, high = hist_limits(nll, classes == NORMAL, thresholds.values())
    edges = np.linspace(low, high, 33)
    width = edges[1] - edges[0]
    under, over = nll < low, nll > high
    # the bins at the edges are three bars wide and stand one bar apart from the axis proper
    left, right = low - 2.5 * width, high + 2.5 * width
    place = np.where(over, right, np.where(under, left, nll))
    rows = len(names) if strips else 0
    figure, axes = _figure(9.0, 4.6 + (0.35 * rows + 0.4 if rows else 0))
    points: Axes | None = None
    if rows:
        figure.delaxes(axes)
        axes, points = figure.subplots(2, 1, sharex=True, height_ratios=[3.6, 0.35 * rows + 0.3])
    spans = [(left, under), (right, over)]
    _bars(axes, nll, classes == NORMAL, edges, spans)
    both = [axes] if points is None else [axes, points]
    for centre, hit in spans:
        if hit.any():
            for a in both:
                a.axvspan(centre - 2 * width, centre + 2 * width, color="#EEEEEE", zorder=0, linewidth=0)
    x_low, x_high = left - 2 * width if under.any() else low, right + 2 * width if over.any() else high
    axes.set_xlim(x_low, x_high)
    for (name, value), (colour, style) in zip(thresholds.items(), cycle(_THRESHOLD_STYLES), strict=False):
        at = min(max(value, low - 0.5 * width, x_low), high + 0.5 * width, x_high)
        where = "" if low <= value <= high else ", beyond this axis"
        label = f"threshold {_plain(name)}: {_minus(nats(value))} nats{where}"
        for a in both:
            a.axvline(at, color=colour, linestyle=style, linewidth=1.6, label=label)
    axes.set_ylabel("share of the group (%)")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.03)
    figure.suptitle("NLL of good and defective images", fontsize=12)
    _legend_above(axes, 2)
    bottom = points if points is not None else axes
    if points is not None:
        _strips(points, names, classes, place, nll, width)
    bottom.set_xlabel("NLL of an image (nats): the higher, the more anomalous")
    ticks = [t for t in MaxNLocator(7).tick_values(low, high) if low <= t <= high]
    texts = [tick_text(t) for t in ticks]
    for (centre, hit), text, furthest in zip(
        spans, (f"below {tick_text(low)}\ndown to ", f"above {tick_text(high)}\nup to "), (np.min, np.max), strict=True
    ):
        if hit.any():
            beyond = nll[hit & np.isfinite(nll)]
            infinite = int(hit.sum()) - len(beyond)
            text += _minus(nats(furthest(beyond))) if len(beyond) else "infinity"
            text += f"\n({infinite} infinite)" if infinite and len(beyond) else ""
            ticks.append(centre)
            texts.append(f"{hit.sum()} image{'' if hit.sum() == 1 else 's'}\n{text}")
    bottom.set_xticks(ticks, texts)
    _save(figure, path, HISTOGRAM)
    return figure


@matplotlib.style.context("default")
def roc_curve(path: str | Path, evaluation: Evaluation) -> Figure:
    """The ROC of an evaluation, its AUROC with interval, and both operating points."""
    figure, axes = _figure(6.0, 6.0)
    label = f"AUROC {evaluation.auroc:.3f}"
    if evaluation.auroc_interval is not None:
        label += " (95% interval {:.3f} to {:.3f})".format(*evaluation.auroc_interval)
    roc = evaluation.roc
    axes.plot(roc.fpr, roc.tpr, color=BLUE, linewidth=2, label=label)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="chance")
    points = [(evaluation.youden, "o", "black", "Youden (chosen on the test labels)")]
    if evaluation.held_out is not None:
        points.append((evaluation.held_out, "s", GREEN, "held-out normals (no test labels)"))
    for report, marker, colour, name in points:
        text = f"{name}:\n{_minus(nats(report.threshold))} nats, {report.false_alarm_rate:.0%} false alarms, "
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
    _save(figure, path, ROC)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    return figure, axes


def _legend_above(axes: Axes, columns: int) -> None:
    """The legend outside, between title and axes, where it hides no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, fontsize=9, frameon=False, borderaxespad=0.2)


def _save(figure: Figure, path: str | Path, role: str) -> None:
    for axes in figure.axes:
        axes.spines[["top"]].set_visible(False)
        axes.set_axisbelow(True)
    if figure.axes:
        figure.axes[0].grid(alpha=0.25, linewidth=0.7)
    with written_atomically(path) as file:
        figure.savefig(file, format="png", dpi=_DPI, facecolor="white", metadata={KEYWORD: role})


def curve_limits(train: np.ndarray, validation: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Limits of the NLL axis: all low values; of the high ones what is not far above the bulk (a blown-up epoch)."""
    low, high = _reach(np.concatenate([train, reference]) if np.isfinite(train).any() else validation)
    val_low, val_high = _reach(validation)
    if val_low < low:
        low = val_low
    span = max(high - low, 0.1 * abs(low))
    if high < val_high <= low + 3 * span:  # a validation curve may not flatten the training curve
        high = val_high
    if not math.isfinite(low):
        return 0.0, 1.0
    margin = 0.04 * (high - low) or max(1.0, 0.05 * abs(low))
    return low - margin, high + margin


def _reach(values: np.ndarray) -> tuple[float, float]:
    """The lowest value, and the highest within twelve times the lower half's spread of the median."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.inf, -math.inf
    median = float(np.median(values))
    spread = median - float(np.quantile(values, 0.05))
    return float(values.min()), float(values[values <= median + 12 * spread].max())


def hist_limits(nll: np.ndarray, normal: np.ndarray, thresholds: Any) -> tuple[float, float]:
    """Where the histogram's bulk lies: whiskers of normals and defects, the latter at most 10 normal spreads away."""
    finite = nll[np.isfinite(nll)]
    if not len(finite):
        return 0.0, 1.0
    base = nll[normal & np.isfinite(nll)]
    base = base if len(base) >= 2 else finite
    q25, q50, q75 = np.quantile(base, [0.25, 0.5, 0.75])
    spread = float(q75 - q25) or float(np.quantile(np.abs(finite - q50), 0.5)) or max(1.0, 0.01 * abs(float(q50)))
    fence_low, fence_high = q50 - 10 * spread, q50 + 10 * spread
    low, high = max(base.min(), q25 - 3 * spread), min(base.max(), q75 + 3 * spread)
    others = nll[~normal & np.isfinite(nll)]
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


def _bars(
    axes: Axes, nll: np.ndarray, normal: np.ndarray, edges: np.ndarray, spans: Sequence[tuple[float, np.ndarray]]
) -> None:
    """Both groups as translucent steps over `edges`, and a bar at the centre of each bin at the edge."""
    width = edges[1] - edges[0]
    far = np.any([hit for _, hit in spans], axis=0)
    for group, name, colour, style in (
        (normal, "good", BLUE, "-"),
        (~normal, "defective", ORANGE, (0, (4, 1.2))),
    ):
        if not group.any():
            continue
        share = 100 / group.sum()
        inside = np.histogram(nll[group & ~far], edges)[0] * share
        inside[inside == 0] = math.nan  # no outline along the axis where there are no images
        axes.stairs(inside, edges, fill=True, color=colour, alpha=0.28)
        axes.stairs(inside, edges, color=colour, linewidth=1.6, linestyle=style, label=f"{name} (n = {group.sum()})")
        for centre, hit in spans:
            if (hit & group).any():
                bar, box = [(hit & group).sum() * share], [centre - 1.5 * width, centre + 1.5 * width]
                axes.stairs(bar, box, fill=True, color=colour, alpha=0.28)
                axes.stairs(bar, box, color=colour, linewidth=1.6, linestyle=style)


def _strips(
    axes: Axes, names: Sequence[str], classes: np.ndarray, place: np.ndarray, nll: np.ndarray, width: float
) -> None:
    """One row of points per class; those in the bins at the edges become triangles, scattered over the bin."""
    jitter = np.random.default_rng(0)
    for row, name in enumerate(names):
        own = classes == name
        colour = BLUE if name == NORMAL else ORANGE
        y = row + jitter.uniform(-0.22, 0.22, len(nll))
        x = np.where(place == nll, nll, place + jitter.uniform(-1.4, 1.4, len(nll)) * width)
        for hit, marker in ((place == nll, "o"), (nll > place, ">"), (nll < place, "<")):
            axes.plot(x[own & hit], y[own & hit], marker, color=colour, markersize=4.5, alpha=0.65, markeredgewidth=0)
        axes.plot([np.median(place[own])], [row], "|", color="black", markersize=14, markeredgewidth=1.6)
    axes.set_yticks(range(len(names)), [f"{_plain(name)} ({(classes == name).sum()})" for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_ylabel("class (images)\nbar: median")
    axes.grid(axis="x", alpha=0.25, linewidth=0.7)
    axes.spines[["right"]].set_visible(False)


def _bits_axis(axes: Axes, log: Sequence[Mapping[str, Any]], train: np.ndarray) -> None:
    """A second scale at the right, bits/dim; the factor is what the log's own two columns say."""
    bits = column(log, "bits_per_dim")
    usable = np.isfinite(bits) & np.isfinite(train) & (bits != 0) & (train != 0)
    if usable.any():
        factor = float(np.median(bits[usable] / train[usable]))

        def to_bits(value: Any) -> Any:
            return value * factor

        def to_nats(value: Any) -> Any:
            return value / factor

        right = axes.secondary_yaxis("right", functions=(to_bits, to_nats))
        right.set_ylabel("bits per dimension")


def column(log: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """The column of a log as float64 [rows]; NaN where the row has no such number."""
    return np.array([math.nan if row.get(key) in (None, "") else float(row[key]) for row in log], dtype=np.float64)


def _few(at: np.ndarray, values: np.ndarray) -> str:
    if len(at) <= 3:
        return ", ".join(f"{_minus(nats(v))} at epoch {e:.0f}" for e, v in zip(at, values, strict=True))
    top = int(np.argmax(values))
    return f"in {len(at)} epochs, most at epoch {at[top]:.0f}: {_minus(nats(values[top]))}"


def tick_text(value: float, _position: int | None = None) -> str:
    """A number of nats for an axis."""
    text = f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:g}"
    return _minus(text if abs(value) < 1e7 else f"{value:.2g}")


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def _plain(text: str) -> str:
    """Text from users, never mathematics: a lone $ or a byte that is no UTF-8 must not stop a figure."""
    return visible(text).replace("$", r"\$")
