"""Bars that say how many times longer than fastmaf the other sides take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fastmaf.bench.figures.sheet import FAINT, INK, SHADE, SMALL, bar, clean, extrapolated_key, name_sides, sheet, write
from fastmaf.bench.look import (
    Style,
    amount,
    case_in_words,
    case_rank,
    is_extrapolated,
    number,
    size_in_words,
    styles,
    value,
)
from fastmaf.bench.rows import Row

Panel = dict[str, Row]  # by side
BAR = 0.2  # inches of a bar with its gap
_AROUND = 0.62  # inches of a panel's title and axis
_COLUMNS = 3


def panels(rows: Iterable[Row], unit: str, length: Callable[[Row], float | None]) -> dict[tuple[str, str], Panel]:
    """Returns the rows of the cases, sweeps left out, that have a ``length``, by case and batch."""
    found: dict[tuple[str, str], Panel] = {}
    for row in rows:
        if not row["sweep"] and row["unit"] == unit and length(row) is not None:
            found.setdefault((row["case"], row["batch"]), {})[row["side"]] = row
    return dict(sorted(found.items(), key=lambda item: case_rank(*item[0])))


def grid(keys: Iterable[tuple[str, str]], columns: int) -> list[list[tuple[str, str]]]:
    """Lays out panels: the batches of a case side by side, and cases of one batch where room is left."""
    batches: dict[str, list[tuple[str, str]]] = {}
    for key in keys:
        batches.setdefault(key[0], []).append(key)
    lone = [group[0] for group in batches.values() if len(group) == 1]
    grid = [
        group[i : i + columns] for group in batches.values() if len(group) > 1 for i in range(0, len(group), columns)
    ]
    for line in grid:
        while lone and len(line) < columns:
            line.append(lone.pop(0))
    return grid + [lone[i : i + columns] for i in range(0, len(lone), columns)]


def is_lowest(layout: Sequence[Sequence[object]], i: int, j: int) -> bool:
    """Whether no panel lies beneath panel ``j`` of line ``i``."""
    return i + 1 == len(layout) or j >= len(layout[i + 1])


def times_fastmaf(row: Row) -> float | None:
    """Returns how many times as long as fastmaf a row took; fastmaf's own says 1 even where nothing is written."""
    return 1.0 if row["side"] == "fastmaf" else value(row, "times_fastmaf")


def speedup(rows: Sequence[Row], about: dict[str, str]) -> Figure | None:
    """Draws how many times longer than fastmaf every other side takes, case by case."""
    found = {key: panel for key, panel in panels(rows, "s", times_fastmaf).items() if set(panel) - {"fastmaf"}}
    if not found:
        return None
    looks, layout = styles(rows), grid(found, _COLUMNS)
    sides = [[side for side in looks if any(side in found[key] for key in line)] for line in layout]
    drawn = [row for panel in found.values() for row in panel.values()]
    figure, places = sheet(
        "How many times longer than fastmaf the others take",
        f"A masked autoregressive flow of {size_in_words(drawn)}. Bars to the right of the line at 1 are slower than "
        "fastmaf, bars to the left, on grey, are faster. Logarithmic scale; medians; a dash: not measured.",
        [side for side in looks if any(side in line for line in sides)],
        about,
        [len(line) * BAR for line in sides],
        _AROUND,
        _COLUMNS,
        [Line2D([], [], color=INK, label="as long as fastmaf"), *extrapolated_key(drawn)],
    )
    for i, line in enumerate(layout):
        for j, key in enumerate(line):
            of_case = [row for other, panel in found.items() if other[0] == key[0] for row in panel.values()]
            axes = figure.add_subplot(places[i, j])
            _scale(axes, [times_fastmaf(row) or 1.0 for row in of_case])
            name_sides(axes, sides[i], looks, shown=j == 0)
            clean(axes, case_in_words(*key))
            axes.spines["left"].set_visible(False)
            for y, side in enumerate(sides[i]):
                _times(axes, y, side, found[key].get(side), looks[side])
            axes.set_xlabel("times as long as fastmaf" if is_lowest(layout, i, j) else "", size=SMALL)
    return figure


def _scale(axes: Axes, ratios: Sequence[float]) -> None:
    """Prepares the axis, which is the same for all panels of a case."""
    low, high = math.log10(min(*ratios, 1.0)), math.log10(max(*ratios, 2.0))
    # What is written beside the bars takes a share of the panel, at the left only where a bar points there.
    left, right = (0.22 if low < 0 else 0.04), 0.36
    width = (high - low) / (1 - left - right)
    low, high = low - left * width, high + right * width
    axes.set(xscale="log", xlim=(10**low, 10**high))
    axes.axvspan(10**low, 1.0, color=SHADE, zorder=0, linewidth=0)
    axes.axvline(1.0, color=INK, linewidth=1.2, zorder=3)
    # Few ticks, of which 1 is one: there is room for four.
    decades = range(math.ceil(low), math.floor(high) + 1)
    step = math.ceil(len(decades) / 4)
    ticks = [10.0**k for k in decades if k % step == 0]
    if len(ticks) <= 2:
        room, ticks = (high - low) / 5, [1.0]
        for way in ((2.0, 5.0, 10.0, 20.0, 50.0), (0.5, 0.2, 0.1, 0.05)):
            last = 1.0
            for tick in way:
                if low < math.log10(tick) < high and abs(math.log10(tick / last)) >= room:
                    ticks.append(tick)
                    last = tick
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
    axes.grid(axis="x", color=FAINT, linewidth=0.6)


def _tick(ratio: float) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if ratio >= size:
            return f"{ratio / size:g}{name}×"
    return f"{ratio:g}×"


def _times(axes: Axes, y: int, side: str, row: Row | None, look: Style) -> None:
    """Draws a bar from 1 on, with its number."""
    ratio = None if row is None else times_fastmaf(row)
    if row is None or ratio is None:
        write(axes, y, 1.0, "–")
    elif side == "fastmaf":
        axes.plot(1, y, look.marker, color=look.colour, markersize=8, zorder=4)
        write(axes, y, 1.0, f"1× = {amount(value(row, 'median') or math.nan, row['unit'])}", heavy=True, gap=8)
    else:
        bar(axes, y, 1.0, ratio, look, is_extrapolated(row))
        write(axes, y, ratio, f"{number(ratio)}×", leftwards=ratio < 1)
