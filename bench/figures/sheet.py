"""The sheet that every figure of the benchmark is drawn on: title, panels, and in words beneath what was measured.

Sizes are in inches: a sheet grows with what it holds, so that bars and letters look the same in every figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath

from fastmaf.bench.look import SIDES_IN_WORDS, Style, is_extrapolated, machine_in_words
from fastmaf.bench.rows import Row

WIDTH, DPI, MARGIN = 10.0, 150, 0.15
SMALL, INK, GREY, FAINT, SHADE = 9.0, "#222222", "#666666", "#DDDDDD", "#F2F2F2"
_LEAD = 9.5  # points
_LINE, _LARGE_LINE = 0.18, 0.21


def sheet(
    title: str,
    lead: str,
    sides: Sequence[str],
    about: dict[str, str],
    heights: Sequence[float],
    around: float,
    columns: int,
    key: Sequence[Artist] = (),
) -> tuple[Figure, GridSpec]:
    """Returns a figure and the grid for its panels.

    Args:
        title: what the figure shows.
        lead: how to read it.
        sides: whose names are explained beneath, where known.
        about: what was measured on what, said beneath that.
        heights: of the axes of each row of panels.
        around: what titles and ticks of a row take.
        columns: panels in a row.
        key: what a legend beneath the lead explains, if anything.
    """
    above = wrapped(lead, _LEAD)
    known = [f"{side} = {SIDES_IN_WORDS[side]}" for side in sides if side in SIDES_IN_WORDS]
    half = (len(known) + 1) // 2
    said = [line for text in machine_in_words(about) for line in wrapped(text, SMALL)]
    top = 0.52 + _LARGE_LINE * len(above) + (0.28 if key else 0.0)
    bottom = 0.36 + _LINE * (half + len(said))
    middle = sum(heights) + around * len(heights)
    height = top + middle + bottom
    figure = Figure((WIDTH, height), dpi=DPI, facecolor="white")
    rect = (MARGIN / WIDTH, bottom / height, 1 - 2 * MARGIN / WIDTH, middle / height)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=rect, h_pad=0.06, w_pad=0.04, hspace=0.0, wspace=0.0))
    left = MARGIN / WIDTH
    figure.text(left, 1 - 0.12 / height, title, size=14, weight="bold", va="top", color=INK)
    figure.text(left, 1 - 0.46 / height, "\n".join(above), size=_LEAD, va="top", color=INK, linespacing=1.35)
    words: dict[str, Any] = {"size": SMALL, "color": GREY, "linespacing": 1.25}
    for x, text in ((left, known[:half]), (0.5, known[half:])):
        figure.text(x, (bottom - 0.13) / height, "\n".join(text), va="top", **words)
    figure.text(left, MARGIN / height, "\n".join(said), va="bottom", **words)
    if key:
        at = (left, 1 - (0.44 + _LARGE_LINE * len(above)) / height)
        figure.legend(
            handles=list(key), loc="upper left", bbox_to_anchor=at, ncols=len(key), frameon=False, fontsize=SMALL,
            borderpad=0, borderaxespad=0,
        )  # fmt: skip
    return figure, GridSpec(len(heights), columns, figure=figure, height_ratios=list(heights))


def wrapped(text: str, size: float) -> list[str]:
    """Breaks a text of ``size`` points into lines as wide as the sheet: measured, as letters differ in width."""
    room, space = 72 * (WIDTH - 2 * MARGIN) * 0.95, 0.35 * size  # pixels make letters a little wider than they are
    lines: list[list[str]] = [[]]
    used = 0.0
    for word in text.split():
        width = TextPath((0, 0), word, size=size).get_extents().width + space
        if lines[-1] and used + width > room:
            lines.append([])
            used = 0.0
        lines[-1].append(word)
        used += width
    return [" ".join(line) for line in lines]


def clean(axes: Axes, title: str, below: str = "") -> None:
    """Gives a panel its title, with a line below it, and takes away the lines that say nothing."""
    axes.set_title(title, loc="left", size=10, weight="bold", color=INK, pad=18 if below else 6)
    if below:
        axes.annotate(below, (0, 1), (0, 5), "axes fraction", "offset points", size=SMALL, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=SMALL, color=GREY, labelcolor=INK)
    axes.set_axisbelow(True)


def name_sides(
    axes: Axes, sides: Sequence[str], styles: dict[str, Style], shown: bool = True, room: int | None = None
) -> None:
    """Writes one side beside each bar, the first on top, fastmaf's in its colour; ``room`` is for how many bars."""
    axes.set_ylim((room or len(sides)) - 0.4, -0.6)
    axes.set_yticks(range(len(sides)), sides if shown else [""] * len(sides))
    axes.tick_params(axis="y", length=0)
    for side, label in zip(sides, axes.get_yticklabels(), strict=True):
        if side == "fastmaf":
            label.set(weight="bold", color=styles[side].colour)


def bar(axes: Axes, y: float, start: float, end: float, style: Style, extrapolated: bool) -> None:
    """Draws a bar, hatched where it was not run to its end."""
    hatch = "////" if extrapolated else None
    axes.barh(y, end - start, left=start, height=0.72, color=style.colour, hatch=hatch, edgecolor="white", linewidth=0)


def write(
    axes: Axes, y: float, end: float, text: str, heavy: bool = False, leftwards: bool = False, gap: int = 4
) -> None:
    """Writes beside the end of a bar."""
    axes.annotate(
        text,
        (end, y),
        (-gap if leftwards else gap, 0),
        textcoords="offset points",
        ha="right" if leftwards else "left",
        va="center_baseline",
        size=SMALL,
        weight="bold" if heavy else "normal",
        color=INK,
        # over a line that it may cross
        bbox={"facecolor": SHADE if leftwards else "white", "edgecolor": "none", "pad": 0.6},
        zorder=5,
    )


def extrapolated_key(rows: Iterable[Row]) -> list[Patch]:
    """Returns what a legend must say of hatched bars, if there are any."""
    label = "hatched: extrapolated from a part of the run"
    return (
        [Patch(facecolor=GREY, edgecolor="white", hatch="////", label=label)] if any(map(is_extrapolated, rows)) else []
    )
