"""Curves and ROCs, drawn onto given axes, with the colours, settings and texts that all figures of NLLs share.

Line widths, marker sizes and the colour of text follow matplotlib's settings, which the callers set. An axis covers the
bulk of the values and those beyond it are marked at its edge: a single image at 4e5 nats must not compress all others,
near -4e4, into one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastmaf.metrics.results import Evaluation

# Okabe-Ito: distinguishable with any colour vision. Groups also differ in line style or marker.
BLUE, ORANGE, GREEN, PURPLE, GREY, SHADE = "#0072B2", "#D55E00", "#009E73", "#8B4A83", "#666666", "#EDEDED"

SETTINGS: dict[str, Any] = {
    "text.parse_math": False,  # a $ in a class name is no formula
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
}


class Curve(NamedTuple):
    """NLLs (nats) by epoch or step."""

    name: str
    at: np.ndarray
    nll: np.ndarray


def draw_curves(axes: Axes, train: Curve, validation: Curve, published: Curve | None = None) -> list[Curve]:
    """Draws NLL curves, and marks values far above the bulk at the upper edge; returns those values, by curve."""
    published = published or Curve("", np.empty(0), np.empty(0))
    low, high = _curve_limits(train.nll, validation.nll, published.nll)
    known = ~np.isnan(validation.nll)
    joined = Curve(validation.name, validation.at[known], validation.nll[known])
    marker = "o" if len(train.at) <= 40 else ""  # a single point has no line
    styles: tuple[dict[str, Any], ...] = (
        {"color": BLUE, "marker": marker},
        {"color": ORANGE, "marker": marker, "ls": "--"},
        {"color": ink(), "marker": "D", "mfc": "white", "markersize": 6, "ls": ""},
    )
    above = []
    for (name, at, nll), style in zip((train, joined, published), styles, strict=True):
        if np.isfinite(nll).any():
            axes.plot(at, nll, label=name, **style)
        out = nll > high
        if out.any():
            edge = np.full(int(out.sum()), 0.985)
            axes.plot(at[out], edge, "^", color=style["color"], markersize=6.5, transform=axes.get_xaxis_transform())
            above.append(Curve(name, at[out], nll[out]))
    axes.set(ylabel="mean NLL of an image (nats)", ylim=(low, high))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    return above


def draw_roc(axes: Axes, evaluation: Evaluation, label: str, points: Sequence[tuple[float, float, str]]) -> None:
    """Draws an ROC with its legend, and one or two operating points (false-alarm rate, detection rate, label)."""
    axes.plot(evaluation.roc.fpr, evaluation.roc.tpr, color=BLUE, label=label, clip_on=False)
    axes.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1, label="chance")
    size = 2 * matplotlib.rcParams["lines.markersize"]
    for (x, y, text), marker, colour in zip(points, "os", (ink(), GREEN), strict=False):
        style = {"markersize": size, "markeredgewidth": 0, "clip_on": False, "zorder": 5}
        axes.plot(x, y, marker, color=colour, label=text, **style)
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel=f"false alarms: share of {evaluation.n_normal} good images",
        ylabel=f"detected: share of {evaluation.n_anomalous} defective images",
        aspect="equal",
    )
    axes.legend(loc="lower right", framealpha=0.9)


def legend_above(axes: Axes) -> None:
    """Puts the legend, if there is any, above the axes, where it hides no data."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, borderaxespad=0.2)


def ink() -> str:
    """Returns the colour of text, which is that of markers and thresholds too."""
    return str(matplotlib.rcParams["text.color"])


def _curve_limits(train: np.ndarray, validation: np.ndarray, published: np.ndarray) -> tuple[float, float]:
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
