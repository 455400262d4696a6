"""What a run measured, as rows of text: one per case, batch and side. CSV and JSON hold the same."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastmaf.io.atomic import written_atomically

Row = dict[str, str]

COLUMNS = (
    "sweep",  # "" for the cases, else what is varied: features, hidden_features, blocks, levels or threads
    "case",
    "batch",
    "side",
    "features",
    "hidden_features",  # 512x512
    "blocks",
    "levels",  # dependent steps allowed in a block of fastmaf; "" for all
    "threads",
    "unit",  # s, or GB for memory
    "median",
    "p20",
    "p80",
    "repeats",
    "first",  # seconds of the first call, which warms up, compiles and allocates
    "must_move",  # the bytes or operations that bound the case, in words
    "limit",  # the time (or memory) that they take on this machine
    "fraction_of_limit",  # limit / median
    "times_fastmaf",  # how many times fastmaf's: the median over rounds in which both took turns (build, epoch: one)
    "error",  # of the part of the check that vouches for the case: relative, of an inverse absolute
    "note",
)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median and the 20th and 80th percentiles."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    # inclusive: of few repeats the other method makes times that none of them took, even negative ones
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), cuts[0], cuts[3]


def row_of(
    names: Row,
    values: Sequence[float],
    times_fast: float | None,
    limit: float | None,
    first: float | None,
    error: float | None,
) -> Row:
    """Adds to a row's names what was measured.

    Args:
        values: of this side, in the row's unit.
        times_fast: how many times fastmaf's they are.
        limit: the least that they could be.
        first: seconds of the first call.
        error: of the check.
    """
    median, p20, p80 = spread(values)
    numbers = {
        "median": median,
        "p20": p20,
        "p80": p80,
        "first": first,
        "limit": limit,
        # Memory that does not show is 0.
        "fraction_of_limit": None if limit is None or not median else limit / median,
        "times_fastmaf": times_fast,
    }
    row = names | {name: "" if value is None else f"{value:.5g}" for name, value in numbers.items()}
    row |= {"repeats": str(len(values)), "error": "" if error is None else f"{error:.1e}"}
    return {column: row.get(column, "") for column in COLUMNS}


def write(rows: Iterable[Row], about: dict[str, str], path: Path) -> None:
    """Writes the rows as CSV, with what they were measured on in every row, and as JSON beside it."""
    rows = list(rows)
    if both := set(about) & set(COLUMNS):
        raise ValueError(f"what rows were measured on has the name of a column: {', '.join(sorted(both))}")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, [*COLUMNS, *about], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **about} for row in rows)
    text = json.dumps({"about": about, "rows": rows}, indent=1, ensure_ascii=False) + "\n"
    for place, content in ((path, table.getvalue()), (path.with_suffix(".json"), text)):
        with written_atomically(place) as file:
            file.write(content.encode())


class NotABenchError(ValueError):
    """A file that is no CSV of the benchmark suite."""


def read(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Returns the rows of a CSV written by ``write`` and what they were measured on.

    Raises:
        NotABenchError: the file holds something else.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            found = reader.fieldnames or []
            every = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise NotABenchError(f"{path} is no CSV of fastmaf bench: {error}") from error
    missing = [column for column in COLUMNS if column not in found]
    if missing:
        raise NotABenchError(
            f"{path} is no CSV of fastmaf bench: expected a column {missing[0]!r}; found {', '.join(found[:5])}, …"
        )
    if not every:
        raise NotABenchError(f"{path} holds no row")
    if any(None in row or None in row.values() for row in every):
        raise NotABenchError(f"{path} holds a row that is longer or shorter than the first line: it was cut or edited")
    about = {name: every[0][name] for name in found if name not in COLUMNS}
    return [{column: row[column] for column in COLUMNS} for row in every], about


def seconds(value: float) -> str:
    """Returns a time in words: three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size or unit == "µs":
            return f"{digits(value / size)} {unit}"
    raise AssertionError("unreachable")


def digits(value: float) -> str:
    """Returns a number with about three digits."""
    if 0 < value < 0.095:
        return f"{value:.2g}"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
