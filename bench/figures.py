"""The figures of ``fastmaf bench``: speed-ups, closeness to the limits, memory and scaling, as PNG files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fastmaf.bench import labels
from fastmaf.bench.labels import SWEEPS, libraries_of
from fastmaf.bench.libraries import LIBRARIES
from fastmaf.bench.rows import Row, is_extrapolated, value
from fastmaf.bench.tables import by_case, median_of, position, slope

SMALL = 8.0  # points


def write(rows: list[Row], about: dict[str, str], folder: Path, stem: str) -> list[Path]:
    """Writes every figure for which there are rows: ``<stem>-speedup.png``, ``-limits``, ``-memory``, ``-scaling-*``.

    Descriptions of the machine that are not in ``about`` are left out.
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
    times = [row for row in rows if row["unit"] == "s" and not row["sweep"]]
    compared = [row for row in times if row["times_fastmaf"]]
    limited = [row for row in times if row["limit"]]
    held = [row for row in rows if row["unit"] == "GB" and not row["sweep"]]
    if libraries_of(compared) not in ([], ["fastmaf"]):
        title, line = "Time as a multiple of fastmaf's", "fastmaf"
        yield "speedup", _bars(compared, about, title, "times_fastmaf", lambda x: f"{labels.digits(x)}×, ", line)
    if limited:
        title = "Limit of the machine as a part of the time"
        line = "the time that a case needs at least, without a matrix unit"
        yield "limits", _bars(limited, about, title, "fraction_of_limit", lambda x: f"{labels.percent(x)}, ", line)
    if held:
        yield "memory", _bars(held, about, "Peak memory in GB", "median", lambda x: "", "what must be held")
    for sweep in SWEEPS:
        if swept := [row for row in rows if row["sweep"] == sweep]:
            yield f"scaling-{sweep}", _scaling(swept, about, sweep)


def _bars(
    rows: list[Row], about: dict[str, str], title: str, column: str, in_words: Callable[[float], str], line: str
) -> Figure:
    names = libraries_of(rows)
    lead = f"Vertical line: {line}. Hatched: extrapolated from a part of the run."
    figure, panels = _panels(rows, about, title, lead, columns=3, height=0.7 + 0.2 * len(names))
    for ax, panel in panels:
        panel.sort(key=lambda row: names.index(row["library"]), reverse=True)
        lengths = [float(row[column]) for row in panel]
        start, longest = 0.0, max(lengths)
        ax.set_xlim(start, 1.8 * longest)  # with room for the texts
        if column == "times_fastmaf":
            start, least = 1.0, min(lengths)
            ax.set(xscale="log", xlim=(least / 1.1, least * max(longest / least, 4.0) ** 1.9))
            ax.xaxis.set_major_formatter("{x:,g}")
        ax.barh(
            [row["library"] for row in panel],
            [length - start for length in lengths],
            left=start,
            color=[_colour(row["library"]) for row in panel],
            hatch=["///" if is_extrapolated(row) else "" for row in panel],
            edgecolor="white",
            linewidth=0,
        )
        for y, (row, length) in enumerate(zip(panel, lengths, strict=True)):
            ax.text(max(length, start), y, f" {in_words(length)}{median_of(row)}", va="center", size=SMALL)
        ax.grid(visible=False, axis="y")
        ax.axvline(float(panel[0]["limit"]) if column == "median" else 1.0, color="black", linewidth=1.0)
    return figure


def _scaling(rows: list[Row], about: dict[str, str], sweep: str) -> Figure:
    title = f"Time and memory against {SWEEPS[sweep]}"
    lead = "Logarithmic axes, with the slope of each line. Dashed: the limit of the machine. Hollow: extrapolated."
    about = {name: text for name, text in about.items() if sweep not in name}
    figure, panels = _panels(rows, about, title, lead, columns=2, height=2.4)
    for ax, panel in panels:
        ax.set(xscale="log", yscale="log", xlabel=SWEEPS[sweep])
        panel.sort(key=position)
        for name in libraries_of(panel):
            line, colour = [row for row in panel if row["library"] == name], _colour(name)
            xs, ys, fit = [position(row) for row in line], [float(row["median"]) for row in line], slope(line)
            ax.plot(xs, ys, color=colour, label=name if math.isnan(fit) else f"{name}: slope {fit:.2f}")
            faces = ["white" if is_extrapolated(row) else colour for row in line]
            ax.scatter(xs, ys, 30, faces, edgecolors=colour, zorder=3)
            if name == "fastmaf":
                ax.plot(xs, [value(row, "limit") or math.nan for row in line], "--", color="black")
        ticks = sorted({position(row) for row in panel})
        ax.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        ax.yaxis.set_major_formatter(partial(_tick, panel[0]["unit"]))
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=SMALL)
    return figure


def _tick(unit: str, number: float, _: object) -> str:
    return labels.amount(number, unit)


def _colour(library: str) -> str:
    return LIBRARIES[library].colour if library in LIBRARIES else "grey"


def _panels(
    rows: list[Row], about: dict[str, str], title: str, lead: str, columns: int, height: float
) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
    """Returns a figure with a title and notes on libraries and machine, and a panel for the rows of each case."""
    cases = dict(sorted(by_case(rows).items(), key=lambda item: labels.case_rank(*item[0])))
    lines = math.ceil(len(cases) / columns)
    figure = Figure((11.0, 1.8 + height * lines), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    described = [f"{name}: {LIBRARIES[name].description}" for name in libraries_of(rows) if name in LIBRARIES]
    lead = f"{lead} A masked autoregressive flow of {labels.size_in_words(rows)}."
    notes = [lead, "; ".join(described), *labels.machine_in_words(about)]
    wrapped = [line for note in notes for line in textwrap.wrap(note, 190)]
    figure.supxlabel("\n".join(wrapped), x=0.01, ha="left", size=SMALL)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax, case in zip(axes, cases, strict=False):
        ax.set_title(labels.case_in_words(*case), loc="left", size=10, weight="bold")
        ax.tick_params(labelsize=SMALL)
        ax.grid(color="#DDDDDD")
        ax.set_axisbelow(True)
    for ax in axes[len(cases) :]:
        ax.remove()
    return figure, list(zip(axes, cases.values(), strict=False))
