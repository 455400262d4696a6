"""The tables of README.md that come from a run of the suite: ``python -m fastmaf.bench.readme`` writes them anew.

They stand between ``<!-- bench NAME -->`` and ``<!-- end -->``; a test fails where they differ from the CSV.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from fastmaf.bench.figures.scaling import slope, varied
from fastmaf.bench.look import case_in_words, is_extrapolated, percent, styles
from fastmaf.bench.report import value
from fastmaf.bench.rows import Row, digits, read

ROOT = Path(__file__).resolve().parents[1]
CSV = ROOT / "bench" / "results" / "cpu.csv"
_MARKED = re.compile(r"(<!-- bench (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_BESIDE = (
    "fastmaf, bfloat16",
    "fastmaf (reference)",
    "dense",
    "dense, compiled",
    "naive",
    "naive, memory kept",
    "naive, compiled",
    "nflows",
    "zuko",
    "normflows",
)
_SWEPT = {
    "features": "D",
    "hidden_features": "units of a hidden layer",
    "blocks": "blocks",
    "levels": "levels",
    "threads": "threads",
}


class NoSuchTableError(ValueError):
    """A marker in a text names a table that there is not."""


def machine(rows: list[Row], about: dict[str, str]) -> str:
    """Returns what the tables were measured on, as a sentence."""
    rates = [
        f"reads {float(about['read_gb_per_s']):.0f} GB/s",
        f"copies {float(about['copy_gb_per_s']):.0f} GB/s",
        f"moves {float(about['adam_gb_per_s']):.0f} GB/s in torch's fused Adam",
        f"multiplies matrices at {float(about['sgemm_gflop_per_s']):.0f} GFLOP/s",
    ]
    versions = [f"{name} {about[name]}" for name in ("torch", *_BESIDE, "flowjax") if about.get(name)]
    return (
        f"{about['processor']}, {about['torch_threads']} threads, which {', '.join(rates[:-1])} and {rates[-1]}; "
        f"huge pages: {about.get('huge_pages', 'unknown')}; {', '.join(versions)}; float32; "
        f"{about['date']}, commit {about['commit']}."
    )


def speed(rows: list[Row], about: dict[str, str]) -> str:
    """Returns the table of times: fastmaf's, its limit, and how many times longer the others take."""
    own = [row for row in rows if not row["sweep"] and row["unit"] == "s"]
    sides = [side for side in (*_BESIDE, "flowjax") if any(row["side"] == side for row in own)]
    lines = _head(["", "fastmaf", "limit", "of it", *sides])
    for key in _cases(own):
        by_side = {row["side"]: row for row in own if (row["case"], row["batch"]) == key}
        if (fast := by_side.get("fastmaf")) is None:
            continue
        share = percent(float(fast["fraction_of_limit"]))
        cells = [case_in_words(*key), f"**{value(fast)}**", f"{value(fast, 'limit')}: {fast['must_move']}", share]
        lines.append(_line([*cells, *(_ratio(by_side.get(side)) for side in sides)]))
    return "\n".join(lines)


def memory(rows: list[Row], about: dict[str, str]) -> str:
    """Returns the table of peak memory."""
    own = [row for row in rows if not row["sweep"] and row["unit"] == "GB"]
    sides = [side for side in ("fastmaf", *_BESIDE, "flowjax") if any(row["side"] == side for row in own)]
    lines = _head(["", *sides, "must be held"])
    for key in _cases(own):
        by_side = {row["side"]: row for row in own if (row["case"], row["batch"]) == key}
        cells = [value(by_side[side]) if side in by_side else "–" for side in sides]
        lines.append(_line([case_in_words(*key), *cells, value(next(iter(by_side.values())), "limit")]))
    return "\n".join(lines)


def growth(rows: list[Row], about: dict[str, str]) -> str:
    """Returns the table of sweeps: first and last value of each side, and the slope of a fit to all in log-log."""
    swept = [row for row in rows if row["sweep"] in _SWEPT and row["case"] != "sampling memory"]
    sides = list(styles(swept))
    lines = _head(["", *sides])
    for sweep, words in _SWEPT.items():
        own = [row for row in swept if row["sweep"] == sweep]
        for key in _cases(own):
            found = [row for row in own if (row["case"], row["batch"]) == key]
            ends = [f"{x:,.0f}" for x in sorted({varied(row) or 0.0 for row in found})]
            cells = [_grown([row for row in found if row["side"] == side]) for side in sides]
            lines.append(_line([f"{case_in_words(*key)}, {words} {ends[0]} → {ends[-1]}", *cells]))
    return "\n".join(lines)


def _grown(rows: list[Row]) -> str:
    if len(rows) < 2:
        return "–"
    rows = sorted(rows, key=lambda row: varied(row) or 0.0)
    fit = slope([varied(row) or 0.0 for row in rows], [float(row["median"]) for row in rows])
    # Rounded before its sign is known: no "-0.00".
    mark = "†" if any(is_extrapolated(row) for row in rows) else ""
    return f"{value(rows[0])} → {value(rows[-1])}{mark}, slope {round(fit, 2) + 0.0:.2f}"


TABLES: dict[str, Callable[[list[Row], dict[str, str]], str]] = {
    "machine": machine,
    "speed": speed,
    "memory": memory,
    "growth": growth,
}


def rendered(text: str, rows: list[Row], about: dict[str, str]) -> str:
    """Returns a text with its tables made anew.

    Raises:
        NoSuchTableError: a marker names none of ``TABLES``.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise NoSuchTableError(f"there is no table {match[2]!r}; expected one of {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]](rows, about)}\n{match[3]}"

    return _MARKED.sub(table, text)


def _cases(rows: list[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["case"], row["batch"]) for row in rows))


def _ratio(row: Row | None) -> str:
    if row is None or not row["times_fastmaf"]:
        return "–"
    return f"{digits(float(row['times_fastmaf']))}×{'†' if is_extrapolated(row) else ''}"


def _head(names: list[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Writes the tables of README.md anew."""
    parser = argparse.ArgumentParser(description="Writes the tables of README.md anew from a CSV of the suite.")
    parser.add_argument("--csv", type=Path, default=CSV)
    asked = parser.parse_args()
    path = ROOT / "README.md"
    text = rendered(path.read_text(encoding="utf-8"), *read(asked.csv))
    path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
