"""Bars that say how near each side comes to what cannot be beaten: the machine's rates, and what must be held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fastmaf.bench.figures.bars import BAR, Panel, grid, is_lowest, panels
from fastmaf.bench.figures.sheet import FAINT, INK, SMALL, bar, clean, extrapolated_key, name_sides, sheet, write
from fastmaf.bench.look import (
    Style,
    amount,
    case_in_words,
    is_extrapolated,
    is_fastmaf,
    percent,
    size_in_words,
    styles,
    value,
)
from fastmaf.bench.rows import Row

_AROUND = 0.8  # inches: of a panel's two lines of title and its axis


class _Words(NamedTuple):
    """What a figure says, and the column whose number, times ``scale``, is the length of a bar."""

    title: str
    lead: str
    line: str  # what the dashed line is
    below: str  # under a panel's title, with the limit and what makes it put in
    label: str
    column: str
    scale: float

    def of(self, row: Row) -> float | None:
        return None if (number := value(row, self.column)) is None else self.scale * number


_LIMITS = _Words(
    "How near fastmaf comes to the limit of this machine",
    "100 % is the time in which this machine could just move the bytes, or do the operations, that a case cannot do "
    "without. Beside fastmaf stands the fastest of the others.",
    "limit of the machine",
    "needs {moved}: {limit} at best",
    "limit / time, in %",
    "fraction_of_limit",
    100.0,
)
_MEMORY = _Words(
    "How much memory each side needs at its peak",
    "Shorter is better. The dashed line is what must be held at least.",
    "what must be held",
    "{limit} must be held",
    "peak memory in GB",
    "median",
    1.0,
)


def limits(rows: Sequence[Row], about: dict[str, str]) -> Figure | None:
    """Draws how near fastmaf and the best of the others come to the limits of the machine."""
    found = {key: _fastmaf_and_best(panel) for key, panel in panels(rows, "s", _LIMITS.of).items()}
    return _figure(rows, about, {key: panel for key, panel in found.items() if panel}, _LIMITS)


def memory(rows: Sequence[Row], about: dict[str, str]) -> Figure | None:
    """Draws the peak memory of every side beside what must be held."""
    return _figure(rows, about, panels(rows, "GB", _MEMORY.of), _MEMORY)


def _fastmaf_and_best(panel: Panel) -> Panel:
    own = {side: row for side, row in panel.items() if is_fastmaf(side)}
    others = sorted(set(panel) - set(own), key=lambda side: -(_LIMITS.of(panel[side]) or 0.0))
    return own | {side: panel[side] for side in others[:1]} if own else {}


def _figure(
    rows: Sequence[Row], about: dict[str, str], found: dict[tuple[str, str], Panel], words: _Words
) -> Figure | None:
    if not found:
        return None
    looks, layout = styles(rows), grid(found, 2)
    drawn = [row for panel in found.values() for row in panel.values()]
    most = [max(2, *(len(found[key]) for key in line)) for line in layout]
    figure, places = sheet(
        words.title,
        f"{words.lead} The flow: {size_in_words(drawn)}.",
        [side for side in looks if any(side in panel for panel in found.values())],
        about,
        [bars * BAR for bars in most],
        _AROUND,
        2,
        [Line2D([], [], color=INK, linestyle="--", label=words.line), *extrapolated_key(drawn)],
    )
    for i, line in enumerate(layout):
        for j, key in enumerate(line):
            panel = {side: found[key][side] for side in looks if side in found[key]}
            axes = figure.add_subplot(places[i, j])
            name_sides(axes, list(panel), looks, room=most[i])
            below = _bars(axes, panel, looks, words)
            clean(axes, case_in_words(*key), below)
            axes.set_xlabel(words.label if is_lowest(layout, i, j) else "", size=SMALL)
    return figure


def _bars(axes: Axes, panel: Panel, looks: dict[str, Style], words: _Words) -> str:
    """Draws a panel and returns what its limit is, in words."""
    limit, must_move = next(
        ((found, row["must_move"]) for row in panel.values() if (found := value(row, "limit")) is not None), (None, "")
    )
    lengths = [words.of(row) or 0.0 for row in panel.values()]
    share = words is _LIMITS
    line = 100.0 if share else limit
    longest = max(*lengths, line or 0.0)
    axes.set_xlim(0, longest * (1.6 if share else 1.35))
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if share:
        axes.set_xticks([tick for tick in range(0, 1000, 50 if longest > 120 else 25) if tick <= longest])
    if line is not None:
        axes.axvline(line, color=INK, linewidth=1.3, linestyle="--", zorder=3)
    for y, ((side, row), length) in enumerate(zip(panel.items(), lengths, strict=True)):
        bar(axes, y, 0.0, length, looks[side], is_extrapolated(row))
        text = amount(value(row, "median") or 0.0, row["unit"])
        if share:
            text = f"{percent(length / 100)}, {text}"
        if row["must_move"] != must_move and (own := value(row, "limit")) is not None:
            text += f" (limit {amount(own, row['unit'])})"
        # Shares stand in a column right of the limit, which they would cross beside their bars.
        write(axes, y, longest if share else length, text, heavy=side == "fastmaf")
    return words.below.format(moved=must_move, limit=amount(limit, row["unit"])) if limit is not None else ""
