"""The rows of a run as tables: for the terminal, and in Markdown for the documentation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from fastmaf.bench.labels import (
    SWEEPS,
    amount,
    case_in_words,
    digits,
    libraries_of,
    machine_in_words,
    percent,
    size_in_words,
)
from fastmaf.bench.libraries import PEERS
from fastmaf.bench.rows import Row, is_extrapolated, value

About = dict[str, str]
SMALL = "small"  # the sweep of flows in which Python takes most of the time


def aligned(cells: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Returns the lines of a table; the columns ``left`` are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip()
        for line in cells
    ]


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Returns the rows of each case and batch."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["batch"]), []).append(row)
    return groups


def median_of(row: Row, column: str = "median") -> str:
    """Returns the median, or another column of the row's unit, in words."""
    return amount(float(row[column]), row["unit"])


def table(rows: list[Row]) -> str:
    """Returns the rows as text, grouped by case and size, in the order in which these first occur."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["sweep"] != SMALL:
            groups.setdefault(_title(row), []).append(row)
    lines: list[str] = []
    for title, group in groups.items():
        limits = [f"   limit {median_of(row, 'limit')} ({row['must_move']})" for row in group if row["limit"]]
        head = ("library", "median", "20–80%", "of limit", "× fastmaf", "error", "note")
        lines += ["", "".join([title, *limits[:1]])]
        lines += [f"  {line}" for line in aligned([head, *map(_cells, group)], (0, 6))]
    if compared := _against_peers(rows):
        lines += ["", "small flows: fastmaf's time, the fastest peer's, and the times of all as multiples of fastmaf's"]
        lines += [f"  {line}" for line in aligned(compared, (0, 2))]
    return "\n".join(lines[1:])


def _title(row: Row) -> str:
    sweep = f"{row['sweep'].replace('_', ' ')}: " if row["sweep"] else ""
    return f"{sweep}{row['case']}{' ' + row['batch'] if row['batch'] else ''}   [{size_in_words([row])}]"


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row["repeats"] == "1" else f"{median_of(row, 'p20')} – {median_of(row, 'p80')}"
    share, times = value(row, "fraction_of_limit"), value(row, "times_fastmaf")
    of_limit, of_fastmaf = "" if share is None else percent(share), "" if times is None else f"{digits(times)} ×"
    return row["library"], median_of(row), spread, of_limit, of_fastmaf, row["error"], row["note"]


def machine(rows: list[Row], about: About) -> str:
    """Returns what the run was measured on."""
    return " ".join(machine_in_words(about))


def speed(rows: list[Row], about: About) -> str:
    """Returns fastmaf's times, their limits, and the times of the others as multiples, in Markdown."""
    rows = [row for row in rows if not row["sweep"] and row["unit"] == "s"]
    others = [name for name in libraries_of(rows) if name != "fastmaf"]
    lines = [["", "fastmaf", "limit", "% of limit", *others]]
    for case, group in by_case(rows).items():
        row_of = {row["library"]: row for row in group}
        if (fast := row_of.get("fastmaf")) is not None:
            share = percent(value(fast, "fraction_of_limit") or math.nan)
            limit = f"{median_of(fast, 'limit')}: {fast['must_move']}"
            multiples = [_multiple(row_of[name]) if name in row_of else "–" for name in others]
            lines.append([case_in_words(*case), f"**{median_of(fast)}**", limit, share, *multiples])
    return markdown(lines)


def small(rows: list[Row], about: About) -> str:
    """Returns the times of small flows: fastmaf's, the fastest peer's, and all as multiples, in Markdown."""
    lines = _against_peers(rows)
    return markdown(lines) if lines else "This run has no small flows."


def _against_peers(rows: Iterable[Row]) -> list[list[str]]:
    """Returns a table of the small flows with its head; nothing where there are none."""
    rows = [row for row in rows if row["sweep"] == SMALL]
    others = [name for name in libraries_of(rows) if name != "fastmaf"]
    lines = []
    sizes = sorted({(int(row["features"]), size_in_words([row | {"threads": ""}])) for row in rows})
    for features, size in sizes:
        for case, group in by_case(row for row in rows if row["features"] == str(features)).items():
            row_of = {row["library"]: row for row in group}
            if (fast := row_of.get("fastmaf")) is None:
                continue
            peers = [row for row in group if row["library"] in PEERS and row["times_fastmaf"]]
            best = min(peers, key=lambda row: float(row["times_fastmaf"]), default=None)
            beside = ("–", "–") if best is None else (f"{median_of(best)} ({best['library']})", _multiple(best))
            multiples = [_multiple(row_of[name]) if name in row_of else "–" for name in others]
            lines.append([f"{case_in_words(*case)}, {size}", median_of(fast), *beside, *multiples])
    return [["", "fastmaf", "best peer", "peer / fastmaf", *others], *lines] if lines else []


def memory(rows: list[Row], about: About) -> str:
    """Returns the peak memory, in Markdown."""
    rows = [row for row in rows if not row["sweep"] and row["unit"] == "GB"]
    names = libraries_of(rows)
    lines = [["", *names, "minimum"]]
    for case, group in by_case(rows).items():
        medians = {row["library"]: median_of(row) for row in group}
        cells = [medians.get(name, "–") for name in names]
        lines.append([case_in_words(*case), *cells, median_of(group[0], "limit")])
    return markdown(lines)


def growth(rows: list[Row], about: About) -> str:
    """Returns the first and last value of every sweep and the slope in log-log, in Markdown."""
    rows = [row for row in rows if row["sweep"] in SWEEPS and row["case"] != "sampling memory"]
    names = libraries_of(rows)
    lines = [["", *names]]
    for sweep, words in SWEEPS.items():
        for case, group in by_case(row for row in rows if row["sweep"] == sweep).items():
            group.sort(key=position)
            ends = f"{words} {position(group[0]):,.0f} → {position(group[-1]):,.0f}"
            cells = [_growth([row for row in group if row["library"] == name]) for name in names]
            lines.append([f"{case_in_words(*case)}, {ends}", *cells])
    return markdown(lines)


MARKDOWN = {"machine": machine, "speed": speed, "small": small, "memory": memory, "growth": growth}


def position(row: Row) -> float:
    """Returns where a row lies along what its sweep varies: at 512 for 512x512 hidden units."""
    # All levels: one per unit of a hidden layer.
    column = "hidden_features" if row["sweep"] == "levels" and not row["levels"] else row["sweep"]
    return float(row[column].split("x")[0])


def slope(rows: Sequence[Row]) -> float:
    """Returns the exponent of the power law of a sweep that fits best (least squares in log-log)."""
    xs = [position(row) for row in rows]
    if len(set(xs)) < 2:
        return math.nan
    return float(np.polyfit(np.log(xs), np.log([float(row["median"]) for row in rows]), 1)[0])


def _growth(rows: list[Row]) -> str:
    if len(rows) < 2:
        return "–"
    mark = "†" if any(map(is_extrapolated, rows)) else ""
    # + 0.0: no "-0.00"
    return f"{median_of(rows[0])} → {median_of(rows[-1])}{mark}, slope {round(slope(rows), 2) + 0.0:.2f}"


def _multiple(row: Row) -> str:
    times = value(row, "times_fastmaf")
    return "–" if times is None else f"{digits(times)}×{'†' if is_extrapolated(row) else ''}"


def markdown(lines: list[list[str]]) -> str:
    """Returns a table in Markdown; the first line is its head."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, f"|{' --- |' * len(lines[0])}", *body])
