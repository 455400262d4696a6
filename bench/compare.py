"""Compares two runs of the benchmark row by row: ``fastmaf bench --compare A.csv B.csv``.

A row of B is slower than the same row of A if its median is more than ``SLOWER`` times as long and the spreads do not
overlap: B's 20th percentile lies above A's 80th. Faster is the same in reverse. Memory varies little, so that for it
``LARGER`` times as much suffices.

The machine itself may have been slower. Each run measures the machine's limits, and each row holds the time that its
bytes or operations take at the limit. A row whose change, divided by the change of that time, is at most ``SLOWER``
is marked "machine" and is no regression.
"""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmaf.bench.labels import RATES, case_rank, machine_in_words, percent
from fastmaf.bench.rows import Row, read, value
from fastmaf.bench.tables import aligned, median_of
from fastmaf.io.wording import count

SLOWER = 1.1  # medians of two runs of the same code differ by several percent on a shared machine
LARGER = 1.05  # allocations are the same from run to run, apart from what the allocator keeps
REGRESSION, IMPROVEMENT, MACHINE = "REGRESSION", "improvement", "machine"

_KEY = ("sweep", "case", "batch", "library", "features", "hidden_features", "blocks", "levels", "threads")


class Pair(NamedTuple):
    """The same row of A and B."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        """B's median / A's."""
        return float(self.after["median"]) / float(self.before["median"])

    @property
    def verdict(self) -> str:
        """REGRESSION, IMPROVEMENT, MACHINE, or "" if too little changed."""
        low, high = sorted(self, key=lambda row: float(row["median"]))
        change, memory = max(self.ratio, 1 / self.ratio), self.before["unit"] == "GB"
        # What was run once has no spread.
        overlap = float(high["p20"] or high["median"]) <= float(low["p80"] or low["median"])
        if change <= (LARGER if memory else SLOWER) or (overlap and not memory):
            return ""
        # The limit of other bytes or operations is due to the code, and so is that of memory.
        same_work = low["must_move"] == high["must_move"] and not memory
        limits = [value(row, "limit") for row in (low, high)]
        if same_work and limits[0] and limits[1] and change * limits[0] / limits[1] <= SLOWER:
            return MACHINE
        return REGRESSION if self.ratio > 1 else IMPROVEMENT


class Comparison(NamedTuple):
    """Two runs, row by row.

    Attributes:
        text: a table, the worst ratios first.
        pairs: the rows of both runs, in the same order.
    """

    text: str
    pairs: list[Pair]

    @property
    def has_regression(self) -> bool:
        """Whether a row of B is slower or larger."""
        return any(pair.verdict == REGRESSION for pair in self.pairs)

    def to_json(self) -> dict[str, Any]:
        """Returns the compared rows as JSON types."""
        rows = [
            {
                **{column: pair.after[column] for column in _KEY},
                "unit": pair.after["unit"],
                "a": float(pair.before["median"]),
                "b": float(pair.after["median"]),
                "ratio": pair.ratio,
                "verdict": pair.verdict.lower() or "same",
            }
            for pair in self.pairs
        ]
        return {"regression": self.has_regression, "rows": rows}


def compare(before: Path, after: Path) -> Comparison:
    """Compares the runs of two CSV files.

    Raises:
        NotABenchError: a file is no CSV of the benchmark.
        OSError: a file cannot be read.
    """
    (old, old_about), (new, new_about) = read(before), read(after)
    a, b = ({tuple(row[column] for column in _KEY): row for row in run if row["median"]} for run in (old, new))
    pairs = [Pair(a[key], b[key]) for key in a if key in b]
    pairs.sort(key=lambda pair: (-pair.ratio, case_rank(pair.before["case"], pair.before["batch"])))
    counts = Counter(pair.verdict for pair in pairs)
    lines = [" ".join([f"A: {before}.", *machine_in_words(old_about)[:2]])]
    lines += [" ".join([f"B: {after}.", *machine_in_words(new_about)[:2]])]
    if any(old_about.get(name) != new_about.get(name) for name in ("processor", "card", "torch_threads")):
        lines.append("The machines differ: ratios compare them too.")
    lines += [_limits(old_about, new_about), ""]
    head = ["B / A", "A", "B", "of the limit", "", "case, batch and library"]
    lines += aligned([head, *map(_cells, pairs)], (4, 5)) if pairs else ["No row is in both files."]
    lines += [
        "",
        f"{count(len(pairs), 'row')} compared: {counts[REGRESSION]} slower or larger (REGRESSION), "
        f"{counts[IMPROVEMENT]} faster or smaller (improvement), "
        f"{counts[MACHINE]} changed as the machine's limits did (machine).",
        *_only_in("A", [row for key, row in a.items() if key not in b]),
        *_only_in("B", [row for key, row in b.items() if key not in a]),
    ]
    return Comparison("\n".join(lines), pairs)


def _limits(old: dict[str, str], new: dict[str, str]) -> str:
    both = [key for key in RATES if key in old and key in new]
    ratios = {RATES[key][0]: float(new[key]) / float(old[key]) for key in both}
    if not ratios:
        return "The limits of the machine are not in both files: the machine itself may have been slower."
    each = ", ".join(f"{words} {ratio:.2f}" for words, ratio in ratios.items())
    return f"Limits of the machine, B / A: {each}; median {statistics.median(ratios.values()):.2f} (below 1: slower)."


def _name(row: Row) -> str:
    varied = "features" if row["sweep"] == "small" else row["sweep"]
    sweep = f" at {row[varied] or 'all'} {varied}" if varied in _KEY else ""
    return f"{' '.join(filter(None, (row['case'], row['batch'])))}, {row['library']}{sweep}"


def _cells(pair: Pair) -> list[str]:
    shares = [value(row, "fraction_of_limit") for row in pair]
    of_limit = " → ".join("?" if share is None else percent(share) for share in shares) if any(shares) else ""
    return [f"{pair.ratio:.2f}", *map(median_of, pair), of_limit, pair.verdict, _name(pair.after)]


def _only_in(name: str, rows: Sequence[Row]) -> list[str]:
    names = textwrap.shorten("; ".join(map(_name, rows)), 1000, placeholder=" …")
    return [f"Only in {name}: {count(len(rows), 'row')}: {names}."] if rows else []
