"""The results of a run as rows of text: one per case, batch and library, stored as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import fastmaf
from fastmaf.bench.cases import Case, Group
from fastmaf.bench.libraries import LIBRARIES
from fastmaf.io.atomic import written_atomically

Row = dict[str, str]

COLUMNS = (
    "sweep",  # "" for the cases, else what varies: features, hidden_features, blocks, levels or threads; or "small"
    "case",
    "batch",
    "library",
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
    "must_move",  # the bytes or operations that bound the case
    "limit",  # the time (or memory) that they take on this machine
    "fraction_of_limit",  # limit / median
    "times_fastmaf",  # multiple of fastmaf's time: the median over rounds in which both took turns (build, epoch: one)
    "error",  # of the part of the check that covers the case: relative, of an inverse absolute
    "note",
)
# Files of earlier versions.
_RENAMED_COLUMNS = {"side": "library"}
_RENAMED_LIBRARIES = {"fastmaf (reference)": "fastmaf (torch)"}


class Measured(NamedTuple):
    """What one library took for one case."""

    group: Group
    case: Case
    library: str
    values: list[float]  # in the unit of the case
    times_fastmaf: float | None = None
    first: float | None = None
    note: str = ""
    error: float | None = None

    def row(self, limits: dict[str, float]) -> Row:
        """Returns the row; ``limits`` are the rates of the machine."""
        (sweep, size, threads, *_), case = self.group, self.case
        flow = fastmaf.MAF(size.features, size.blocks, size.hidden, order="natural", levels=size.levels, device="meta")
        amounts = flow.visible_weights, LIBRARIES[self.library].weight_bytes, limits
        limit, must_move = case.limit(*amounts)
        in_cache = case.fits_in_cache(*amounts) if self.library.startswith("fastmaf") else ""
        median, p20, p80 = np.quantile(self.values, (0.5, 0.2, 0.8))
        share = limit / median if median else None
        values = {
            "sweep": sweep,
            "case": case.name,
            "batch": case.batch or None,
            "library": self.library,
            "features": size.features,
            "hidden_features": "x".join(map(str, size.hidden)),
            "blocks": size.blocks,
            "levels": size.levels,
            "threads": threads or torch.get_num_threads(),
            "unit": case.unit,
            **{"median": median, "p20": p20, "p80": p80},
            "repeats": len(self.values),
            "first": self.first,
            "must_move": must_move,
            "limit": limit,
            "fraction_of_limit": share,
            "times_fastmaf": self.times_fastmaf,
            "error": None if self.error is None else f"{self.error:.1e}",
            "note": "; ".join(filter(None, (self.note, in_cache))),
        }
        texts = {name: f"{value:.5g}" if isinstance(value, float) else str(value) for name, value in values.items()}
        return {name: "" if values[name] is None else texts[name] for name in COLUMNS}


def value(row: Row, column: str = "median") -> float | None:
    """Returns a number of a row, None where it holds none."""
    return float(row[column]) if row[column] else None


def is_extrapolated(row: Row) -> bool:
    """Whether only a part was run."""
    return "extrapolated" in row["note"]


def write(rows: Iterable[Row], about: dict[str, str], path: Path) -> None:
    """Writes the rows as CSV, with the description of the machine in every row, and as JSON beside it."""
    rows = list(rows)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, [*COLUMNS, *about], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **about} for row in rows)
    text = json.dumps({"about": about, "rows": rows}, indent=1, ensure_ascii=False) + "\n"
    for target, content in ((path, table.getvalue()), (path.with_suffix(".json"), text)):
        with written_atomically(target) as file:
            file.write(content.encode())


class NotABenchError(ValueError):
    """The file is no CSV of the benchmark suite."""


def read(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Returns the rows of a CSV written by ``write``, also by earlier versions, and the description of the machine.

    Raises:
        NotABenchError: the file holds something else.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [_RENAMED_COLUMNS.get(name, name) for name in reader.fieldnames or ()]
            columns, rows = reader.fieldnames, list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise NotABenchError(f"{path} is no CSV of fastmaf bench: {error}") from error
    if missing := [column for column in COLUMNS if column not in columns]:
        raise NotABenchError(
            f"{path} is no CSV of fastmaf bench: expected a column {missing[0]!r}; found {', '.join(columns[:5])}, …"
        )
    if not rows:
        raise NotABenchError(f"{path} holds no row")
    if any(None in row or None in row.values() for row in rows):
        raise NotABenchError(f"{path} holds a row that is longer or shorter than the first line")
    for row in rows:
        row["library"] = _RENAMED_LIBRARIES.get(row["library"], row["library"])
    about = {name: rows[0][name] for name in columns if name not in COLUMNS}
    return [{column: row[column] for column in COLUMNS} for row in rows], about
