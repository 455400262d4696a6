"""The rows of a run as tables: for the terminal, and in Markdown for README.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from fastmaf.bench.labels import SWEEPS, amount, case_in_words, digits, labels, machine_in_words, percent
from fastmaf.bench.rows import Row, is_extrapolated, value

About = dict[str, str]


def aligned(cells: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Returns the lines of a table; the columns ``left`` are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip()
        for line in cells
    ]


def table(rows: list[Row]) -> str:
    """Returns the rows as text, grouped by case, in the order in which the cases first occur."""
    lines: list[str] = []
    first = {title: i for i, title in reversed(list(enumerate(map(_title, rows))))}
    for title, group in groupby(sorted(rows, key=lambda row: first[_title(row)]), key=_title):
        members = list(group)
        known = next((row for row in members if row["limit"]), None)
        limit = f"   limit {_amount(known, 'limit')} ({known['must_move']})" if known else ""
        head = ("library", "median", "20–80 %", "of limit", "× fastmaf", "error", "note")
        lines += ["", title + limit, *(f"  {line}" for line in aligned([head, *map(_cells, members)], (0, 6)))]
    return "\n".join(lines[1:])


def about_lines(about: About) -> str:
    """Returns the description of the machine, one line each."""
    return "\n".join(aligned(list(about.items()), (0, 1)))


def _amount(row: Row, column: str = "median") -> str:
    return amount(float(row[column]), row["unit"])


def _title(row: Row) -> str:
    size = f"D = {int(row['features']):,}, hidden {row['hidden_features']}, {row['blocks']} blocks"
    size += f", {row['levels']} levels" if row["levels"] else ""
    size += f", {row['threads']} threads" if row["sweep"] == "threads" else ""
    sweep = f"{row['sweep'].replace('_', ' ')}: " if row["sweep"] else ""
    return f"{sweep}{row['case']}{' ' + row['batch'] if row['batch'] else ''}   [{size}]"


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row["repeats"] == "1" else f"{_amount(row, 'p20')} – {_amount(row, 'p80')}"
    share, times = value(row, "fraction_of_limit"), value(row, "times_fastmaf")
    return (
        row["library"],
        _amount(row),
        spread,
        "" if share is None else percent(share),
        "" if times is None else f"{digits(times)} ×",
        row["error"],
        row["note"],
    )


def machine(rows: list[Row], about: About) -> str:
    """Returns what the run was measured on."""
    return " ".join(machine_in_words(about))


def speed(rows: list[Row], about: About) -> str:
    """Returns fastmaf's times, their limits, and the times of the others as multiples, in Markdown."""
    rows = [row for row in rows if not row["sweep"] and row["unit"] == "s"]
    others = [name for name in labels(rows) if name != "fastmaf"]
    lines = [["", "fastmaf", "limit", "% of limit", *others]]
    for case, group in _by_case(rows).items():
        if (fast := group.get("fastmaf")) is not None:
            share = percent(value(fast, "fraction_of_limit") or math.nan)
            limit = f"{_amount(fast, 'limit')}: {fast['must_move']}"
            multiples = [_multiple(group.get(name)) for name in others]
            lines.append([case_in_words(*case), f"**{_amount(fast)}**", limit, share, *multiples])
    return _markdown(lines)


def memory(rows: list[Row], about: About) -> str:
    """Returns the peak memory, in Markdown."""
    rows = [row for row in rows if not row["sweep"] and row["unit"] == "GB"]
    names = list(labels(rows))
    lines = [["", *names, "minimum"]]
    for case, group in _by_case(rows).items():
        cells = [_amount(group[name]) if name in group else "–" for name in names]
        lines.append([case_in_words(*case), *cells, _amount(next(iter(group.values())), "limit")])
    return _markdown(lines)


def growth(rows: list[Row], about: About) -> str:
    """Returns the first and last value of every sweep and the slope in log-log, in Markdown."""
    rows = [row for row in rows if row["sweep"] in SWEEPS and row["case"] != "sampling memory"]
    names = list(labels(rows))
    lines = [["", *names]]
    for sweep, (words, _) in SWEEPS.items():
        swept = [row for row in rows if row["sweep"] == sweep]
        for case in _by_case(swept):
            group = sorted((row for row in swept if (row["case"], row["batch"]) == case), key=position)
            ends = f"{words} {position(group[0]):,.0f} → {position(group[-1]):,.0f}"
            cells = [_growth([row for row in group if row["library"] == name]) for name in names]
            lines.append([f"{case_in_words(*case)}, {ends}", *cells])
    return _markdown(lines)


MARKDOWN = {"machine": machine, "speed": speed, "memory": memory, "growth": growth}


def position(row: Row) -> float:
    """Returns where a row lies along what its sweep varies: at 512 for 512x512 hidden units; NaN if unknown."""
    text = row.get(row["sweep"], "")
    if row["sweep"] == "levels" and not text:
        text = row["hidden_features"]  # all levels: one per unit of a hidden layer
    first = text.split("x")[0]
    return float(first) if first.isdigit() and int(first) > 0 else math.nan


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Returns the exponent of the power law that fits best (least squares in log-log); NaN for fewer than two xs."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0]) if len(set(xs)) > 1 else math.nan


def _growth(rows: list[Row]) -> str:
    if len(rows) < 2:
        return "–"
    fit = slope([position(row) for row in rows], [float(row["median"]) for row in rows])
    mark = "†" if any(map(is_extrapolated, rows)) else ""
    return f"{_amount(rows[0])} → {_amount(rows[-1])}{mark}, slope {round(fit, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"


def _by_case(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["batch"]), {})[row["library"]] = row
    return groups


def _multiple(row: Row | None) -> str:
    if row is None or (times := value(row, "times_fastmaf")) is None:
        return "–"
    return f"{digits(times)}×{'†' if is_extrapolated(row) else ''}"


def _markdown(lines: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, f"|{' --- |' * len(lines[0])}", *body])
