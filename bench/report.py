"""The rows of a run as text."""

from __future__ import annotations

from itertools import groupby

from fastmaf.bench.rows import Row, digits, seconds

HEAD = ("side", "median", "20–80 %", "of limit", "× fastmaf", "error", "note")


def table(rows: list[Row]) -> str:
    """Returns the rows as text, grouped by case; sweeps come last."""
    lines: list[str] = []
    for key, group in groupby(sorted(rows, key=_place(rows)), key=_title):
        own = list(group)
        lines += ["", key + _limit(own)]
        cells = [HEAD, *map(_cells, own)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(HEAD))]
        for row in cells:
            padded = [
                cell.ljust(w) if i in (0, 6) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append(("  " + "  ".join(padded)).rstrip())
    return "\n".join(lines[1:])


def about_lines(about: dict[str, str]) -> str:
    """Returns what a run was measured on as text, one line each."""
    width = max(map(len, about))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in about.items())


def value(row: Row, column: str = "median") -> str:
    """Returns a row's time or memory with its unit."""
    number = float(row[column])
    return f"{digits(number)} GB" if row["unit"] == "GB" else seconds(number)


def times(row: Row) -> str:
    """Returns how many times longer than fastmaf's a row's time is."""
    return f"{digits(float(row['times_fastmaf']))} ×" if row["times_fastmaf"] else ""


def _place(rows: list[Row]):  # type: ignore[no-untyped-def]
    """Keeps the order of cases, and brings together what belongs to one."""
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(_title(row), i)
    return lambda row: first[_title(row)]


def _title(row: Row) -> str:
    size = f"D = {int(row['features']):,}, hidden {row['hidden_features']}, {row['blocks']} blocks"
    size += f", {row['levels']} levels" if row["levels"] else ""
    size += f", {row['threads']} threads" if row["sweep"] == "threads" else ""
    swept = f"{row['sweep'].replace('_', ' ')}: " if row["sweep"] else ""
    return f"{swept}{row['case']}{' ' + row['batch'] if row['batch'] else ''}   [{size}]"


def _limit(rows: list[Row]) -> str:
    known = next((row for row in rows if row["limit"]), None)
    return "" if known is None else f"   limit {value(known, 'limit')} ({known['must_move']})"


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row["repeats"] == "1" else f"{value(row, 'p20')} – {value(row, 'p80')}"
    share = f"{float(row['fraction_of_limit']):.1%}" if row["fraction_of_limit"] else ""
    if share.endswith("%") and float(row["fraction_of_limit"]) < 0.001:
        share = f"{float(row['fraction_of_limit']):.0e}"
    return row["side"], value(row), spread, share, times(row), row["error"], row["note"]
