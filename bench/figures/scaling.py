"""Lines that say how time and memory grow with what a sweep varies, on logarithmic axes, with their slopes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from fastmaf.bench.figures.sheet import FAINT, GREY, INK, SMALL, clean, sheet
from fastmaf.bench.look import Style, case_in_words, case_rank, is_extrapolated, size_in_words, styles, value
from fastmaf.bench.rows import Row

# What a sweep varies: in the title, and along the axis.
_VARIED = {
    "features": ("the number of features", "features (dimensions of the data)"),
    "hidden_features": ("the width of the hidden layers", "units of a hidden layer"),
    "blocks": ("the number of blocks", "blocks"),
    "levels": ("the number of levels", "levels (dependent steps of a block)"),
    "threads": ("the number of threads", "threads"),
}
_HEIGHT, _AROUND = 2.35, 0.7  # inches of a panel, and of its title and axis

Line = list[tuple[float, float, bool]]  # what is varied, time or memory, and whether it is extrapolated


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Returns the exponent p of the power law y = c xᵖ that fits best: least squares of log y on log x.

    NaN where fewer than two different ``xs`` say nothing of it.
    """
    if len(set(xs)) < 2:
        return math.nan
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    middle, height = sum(u) / len(u), sum(v) / len(v)
    above = sum((a - middle) * (b - height) for a, b in zip(u, v, strict=True))
    return above / sum((a - middle) ** 2 for a in u)


def varied(row: Row) -> float | None:
    """Returns where a row lies along what its sweep varies: for 512x512 hidden units at 512."""
    text = row.get(row["sweep"], "")
    if row["sweep"] == "levels" and not text:
        text = row["hidden_features"]  # all levels: one for each unit of a hidden layer
    first = text.split("x")[0]
    return float(first) if first.isdigit() and int(first) > 0 else None


def scaling(rows: Sequence[Row], about: dict[str, str], sweep: str) -> Figure | None:
    """Draws every case of a sweep against what it varies."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["sweep"] == sweep and varied(row) is not None and (value(row, "median") or 0.0) > 0:
            found.setdefault((row["case"], row["batch"]), []).append(row)
    if not found:
        return None
    looks, keys = styles(rows), sorted(found, key=lambda key: case_rank(*key))
    drawn = [row for key in keys for row in found[key]]
    columns, (name, axis) = 2, _VARIED.get(sweep, (sweep, sweep))
    dashed = Line2D([], [], color=INK, linestyle="--", label="limit: what must be moved or held at least")
    hollow = Line2D([], [], color=GREY, marker="o", markerfacecolor="white", label="hollow: extrapolated")
    figure, places = sheet(
        f"How time and memory change with {name}",
        f"A masked autoregressive flow of {size_in_words(drawn, but=sweep)}. Both axes are logarithmic: slope 1 is "
        "growth in proportion, slope 2 with the square, slope 0 none. Each slope is fitted to all points of its line.",
        [side for side in looks if any(row["side"] == side for row in drawn)],
        {name: text for name, text in about.items() if sweep not in name},  # threads, where they are what varies
        [_HEIGHT] * math.ceil(len(keys) / columns),
        _AROUND,
        columns,
        ([dashed] if any(row["limit"] for row in drawn) else [])
        + ([hollow] if any(map(is_extrapolated, drawn)) else []),
    )
    for i, key in enumerate(keys):
        axes = figure.add_subplot(places[i // columns, i % columns])
        _panel(axes, found[key], looks)
        clean(axes, case_in_words(*key))
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlabel(axis, size=SMALL)
        axes.set_ylabel("peak memory" if found[key][0]["unit"] == "GB" else "median time", size=SMALL)
    return figure


def lines_of(panel: Sequence[Row], column: str) -> dict[str, Line]:
    """Returns the points of every side, ordered along what is varied."""
    found: dict[str, Line] = {}
    for row in panel:
        at, height = varied(row), value(row, column)
        if at is not None and height is not None and height > 0:
            found.setdefault(row["side"], []).append((at, height, is_extrapolated(row)))
    return {side: sorted(line) for side, line in found.items()}


def _panel(axes: Axes, panel: Sequence[Row], looks: dict[str, Style]) -> None:
    axes.set(xscale="log", yscale="log")
    lines, bounds = lines_of(panel, "median"), lines_of(panel, "limit")
    # The legend names the lines from the top down, as they end at the right.
    for side in sorted(lines, key=lambda side: (-lines[side][-1][0], -lines[side][-1][1])):
        xs, ys, _ = zip(*lines[side], strict=True)
        own, (colour, marker) = side == "fastmaf", looks[side]
        axes.plot(
            xs,
            ys,
            color=colour,
            marker=marker,
            linewidth=2.8 if own else 1.2,
            markersize=7 if own else 5.5,
            zorder=4 if own else 3,
            label=_label(side, slope(xs, ys)),
        )
        hollows = [(x, y) for x, y, empty in lines[side] if empty]
        if hollows:
            axes.plot(
                *zip(*hollows, strict=True), marker, color=colour, markerfacecolor="white", markersize=5.5, zorder=5
            )
    if bounds:
        side = "fastmaf" if "fastmaf" in bounds else next(iter(bounds))
        xs, ys, _ = zip(*bounds[side], strict=True)
        axes.plot(xs, ys, color=INK, linestyle="--", linewidth=1.3, zorder=2, label="limit")
    _ticks(axes, sorted({x for line in lines.values() for x, _, _ in line}), panel[0]["unit"])
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8, handlelength=1.6, labelspacing=0.35
    )
    for text in legend.get_texts():
        if text.get_text().split(":")[0] == "fastmaf":
            text.set(weight="bold")


def _label(side: str, fitted: float) -> str:
    number = f"{round(fitted, 2) + 0.0:.2f}".replace("-", "−")  # + 0.0 makes of -0.0 a plain 0
    return side if math.isnan(fitted) else f"{side}: slope {number}"


def _ticks(axes: Axes, measured: list[float], unit: str) -> None:
    """Puts ticks where was measured, as these are few; the others at decades, with their units."""
    axes.xaxis.set_major_locator(FixedLocator(measured))
    named, room = measured[:1], math.log(measured[-1] / measured[0]) / 9
    for x in measured[1:]:
        named += [x] if math.log(x / named[-1]) > room else []
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: "" if x not in named else f"{x:,.0f}" if measured[-1] > 9999 else f"{x:.0f}")
    )
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick(y, unit)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(color=FAINT, linewidth=0.6)


def tick(value: float, unit: str) -> str:
    """Returns a round time or memory in its unit: 10 ms, 500 MB."""
    units = {"s": (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)), "GB": (("GB", 1.0), ("MB", 1e-3), ("kB", 1e-6))}
    small = units.get(unit, ((unit, 1.0),))
    # rounded: 1e-3 / 1e-3 may be a little less than one
    name, size = next(((name, size) for name, size in small if round(value / size, 9) >= 1), small[-1])
    count = round(value / size, 9)
    return f"{count:,.0f} {name}" if count >= 1 else f"{count:g} {name}"
