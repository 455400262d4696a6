"""The figures of ``fastmaf bench``: speed-ups, closeness to the limits, memory and scaling, as PNG files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from PIL import Image

from fastmaf.bench.labels import (
    LABELS,
    SWEEPS,
    Label,
    amount,
    case_in_words,
    case_rank,
    digits,
    labels,
    machine_in_words,
    percent,
    size_in_words,
)
from fastmaf.bench.rows import Row, is_extrapolated, value
from fastmaf.bench.tables import position, slope

WIDTH = 11.0  # inches
SMALL, INK, GREY, FAINT = 8.0, "#222222", "#666666", "#DDDDDD"
Panels = dict[tuple[str, str], list[Row]]  # by case and batch


def write(rows: list[Row], about: dict[str, str], folder: Path, stem: str) -> list[Path]:
    """Writes every figure for which there are rows: ``<stem>-speedup.png``, ``-limits``, ``-memory``, ``-scaling-*``.

    Args:
        rows: of a run.
        about: description of the machine; what is missing is left out.
        folder: created if necessary.
        stem: of the names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.style.context("default"):  # whatever the user's style
        for name, figure in draw(rows, about):
            paths.append(folder / f"{stem}-{name}.png")
            figure.savefig(paths[-1], dpi=110)
            with Image.open(paths[-1]) as image:  # 128 colours suffice, in a third of the size
                image.convert("RGB").quantize(128).save(paths[-1], optimize=True)
    return paths


def draw(rows: list[Row], about: dict[str, str]) -> Iterator[tuple[str, Figure]]:
    """Yields each figure with its name."""
    for name, bars in (("speedup", SPEEDUP), ("limits", LIMITS), ("memory", MEMORY)):
        panels = _panels(rows, lambda row, bars=bars: not row["sweep"] and bars.length(row) is not None)  # type: ignore[misc]
        if name == "speedup":  # without anything to compare with, there is nothing to show
            panels = {case: panel for case, panel in panels.items() if {row["library"] for row in panel} != {"fastmaf"}}
        if panels:
            yield name, _bars(panels, about, bars)
    for sweep in SWEEPS:
        panels = _panels(rows, lambda row, sweep=sweep: row["sweep"] == sweep and position(row) > 0)  # type: ignore[misc]
        if panels:
            yield f"scaling-{sweep}", _scaling(panels, about, sweep)


def _panels(rows: list[Row], wanted: Callable[[Row], bool]) -> Panels:
    panels: Panels = {}
    for row in rows:
        if wanted(row):
            panels.setdefault((row["case"], row["batch"]), []).append(row)
    return dict(sorted(panels.items(), key=lambda item: case_rank(*item[0])))


class _Bars(NamedTuple):
    """A figure of bars: its title, axis label, the length and the text of a bar, and its vertical line."""

    title: str
    axis: str
    length: Callable[[Row], float | None]
    text: Callable[[Row], str]
    line: Callable[[Row], float | None]
    line_label: str
    log: bool = False


def _times_fastmaf(row: Row) -> float | None:
    if row["unit"] != "s":
        return None
    return 1.0 if row["library"] == "fastmaf" else value(row, "times_fastmaf")


def _share(row: Row) -> float | None:
    share = value(row, "fraction_of_limit") if row["unit"] == "s" else None
    return None if share is None else 100 * share


def _median(row: Row) -> str:
    return amount(float(row["median"]), row["unit"])


SPEEDUP = _Bars(
    "Time as a multiple of fastmaf's",
    "multiple of fastmaf's time",
    _times_fastmaf,
    lambda row: _median(row) if row["library"] == "fastmaf" else f"{digits(float(row['times_fastmaf']))}×",
    lambda row: 1.0,
    "fastmaf",
    log=True,
)
LIMITS = _Bars(
    "How close to the limit of the machine",
    "limit / time, in %",
    _share,
    lambda row: f"{percent(float(row['fraction_of_limit']))}, {_median(row)}",
    lambda row: 100.0,
    "the time that the bytes or operations of a case need at least",
)
MEMORY = _Bars(
    "Peak memory",
    "GB",
    lambda row: value(row) if row["unit"] == "GB" else None,
    _median,
    lambda row: value(row, "limit"),
    "what must be held",
)


def _bars(panels: Panels, about: dict[str, str], bars: _Bars) -> Figure:
    rows = [row for panel in panels.values() for row in panel]
    known, columns = labels(rows), 3
    counts = [len(panel) for panel in panels.values()]
    most = [max(counts[i : i + columns]) for i in range(0, len(counts), columns)]  # of each line of panels
    lead = f"Vertical line: {bars.line_label}."
    figure, axes = _sheet(bars.title, lead, rows, about, [0.7 + 0.2 * count for count in most], columns)
    for i, (ax, (case, panel)) in enumerate(zip(axes, panels.items(), strict=False)):
        panel = sorted(panel, key=lambda row: list(known).index(row["library"]))
        lengths, start = [bars.length(row) or 0.0 for row in panel], 1.0 if bars.log else 0.0
        ax.set_xscale("log" if bars.log else "linear")
        drawn = ax.barh(
            [row["library"] for row in panel],
            [length - start for length in lengths],
            left=start,
            color=[known[row["library"]].colour for row in panel],
            hatch=["///" if is_extrapolated(row) else "" for row in panel],
            edgecolor="white",
            linewidth=0,
        )
        for row, rectangle, length in zip(panel, drawn, lengths, strict=True):
            _write(ax, max(length, start), rectangle.get_y() + rectangle.get_height() / 2, bars.text(row))
        if (line := bars.line(panel[0])) is not None:
            ax.axvline(line, color=INK, linewidth=1.0, zorder=3)
        left, right = min([*lengths, start]), max([*lengths, line or 0.0])
        if bars.log:
            span = max(right / left, 4.0)
            ax.set_xlim(left / span**0.1, left * span**1.4)
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if span > 30 else (1.0, 3.0), numticks=4))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e3:,g}k" if x >= 1e3 else f"{x:g}"))
            ax.xaxis.set_minor_locator(NullLocator())
        else:
            ax.set_xlim(0.0, 1.5 * right)
        ax.set_ylim(most[i // columns] - 0.4, -0.6)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(bars.axis, size=SMALL)
        _finish(ax, case, "x")
    return figure


def _write(ax: Axes, x: float, y: float, text: str) -> None:
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # over the vertical line
    offset = {"xytext": (3, 0), "textcoords": "offset points"}
    ax.annotate(text, (x, y), va="center", size=SMALL, color=INK, bbox=background, zorder=4, **offset)  # type: ignore[arg-type]


def _scaling(panels: Panels, about: dict[str, str], sweep: str) -> Figure:
    rows = [row for panel in panels.values() for row in panel]
    title, columns = f"Time and memory against the number of {SWEEPS[sweep][1]}", 2
    lead = "Logarithmic axes, with the slope of each line. Dashed: the limit of the machine. Hollow: extrapolated."
    about = {name: text for name, text in about.items() if sweep not in name}
    heights = [2.4] * math.ceil(len(panels) / columns)
    figure, axes = _sheet(title, lead, rows, about, heights, columns, without=sweep)
    for ax, (case, panel) in zip(axes, panels.items(), strict=False):
        ax.set(xscale="log", yscale="log")
        for name, label in labels(panel).items():
            line = sorted((row for row in panel if row["library"] == name), key=position)
            _line(ax, line, label, name)
            limits = [value(row, "limit") or math.nan for row in line]
            if name == "fastmaf":
                ax.plot([position(row) for row in line], limits, "--", color=INK)
        unit = panel[0]["unit"]
        ax.xaxis.set_major_locator(FixedLocator(sorted({position(row) for row in panel})))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _, unit=unit: amount(y, unit)))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_locator(NullLocator())
        low, high = ax.get_ylim()
        if high / low < 30:
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.set_xlabel(SWEEPS[sweep][1], size=SMALL)
        ax.legend(frameon=False, fontsize=SMALL)
        _finish(ax, case, "both")
    return figure


def _line(ax: Axes, line: list[Row], label: Label, name: str) -> None:
    xs, ys = [position(row) for row in line], [float(row["median"]) for row in line]
    fit = slope(xs, ys)
    text = name if math.isnan(fit) else f"{name}: slope {fit:.2f}"
    ax.plot(xs, ys, color=label.colour, linewidth=2.2 if name == "fastmaf" else 1.2, label=text)
    for x, y, row in zip(xs, ys, line, strict=True):
        face = "white" if is_extrapolated(row) else label.colour
        ax.plot(x, y, label.marker, color=label.colour, markerfacecolor=face, markersize=5.5, zorder=3)


def _finish(ax: Axes, case: tuple[str, str], grid: str) -> None:
    ax.set_title(case_in_words(*case), loc="left", size=10, weight="bold", color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=SMALL)
    ax.grid(axis=grid, color=FAINT, linewidth=0.6)  # type: ignore[arg-type]
    ax.set_axisbelow(True)


def _sheet(
    title: str,
    lead: str,
    rows: list[Row],
    about: dict[str, str],
    heights: Sequence[float],
    columns: int,
    without: str = "",
) -> tuple[Figure, list[Axes]]:
    """Returns a figure with rows of panels of the given ``heights``, a title, and notes on libraries and machine."""
    if any(map(is_extrapolated, rows)) and not without:
        lead += " Hatched: extrapolated from a part of the run."
    lead = "\n".join(textwrap.wrap(f"A masked autoregressive flow of {size_in_words(rows, without)}. {lead}", 150))
    described = [f"{name}: {LABELS[name].description}" for name in labels(rows) if name in LABELS]
    paragraphs = ["; ".join(described), *machine_in_words(about)]
    notes = [line for text in paragraphs for line in textwrap.wrap(text, 190)]
    above, below = 0.65 + 0.15 * (lead.count("\n") + 1), 0.2 + 0.15 * len(notes)
    height = above + sum(heights) + below
    figure = Figure((WIDTH, height), layout="constrained", facecolor="white")
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, below / height, 1, 1 - (above + below) / height))  # type: ignore[call-arg]
    figure.text(0.01, 1 - 0.1 / height, title, size=14, weight="bold", va="top", color=INK)
    figure.text(0.01, 1 - 0.42 / height, lead, size=9, va="top", color=INK)
    figure.text(0.01, 0.1 / height, "\n".join(notes), size=SMALL, va="bottom", color=GREY)
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    for ax in list(axes.flat)[len({(row["case"], row["batch"]) for row in rows}) :]:
        ax.set_visible(False)
    return figure, list(axes.flat)
