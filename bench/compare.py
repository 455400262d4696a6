"""Compares two runs of the benchmark, row by row: ``fastmaf bench --compare A.csv B.csv``.

A row of B is slower than its like in A where both hold: its median is more than ``SLOWER`` times as long, and the
spreads do not meet, so that B's 20th percentile lies above A's 80th. Faster is the same the other way round. Memory
hardly spreads: more than ``LARGER`` times as much is enough.

The machine itself may have been slower. Each run measures the machine's limits, and each row holds the time that its
bytes or operations take at the limit. Where what remains, once the change of that time is divided out, is no more than
``SLOWER``, so that the row reached the same share of its limit as before, it is marked "machine" and is no regression.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastmaf.bench import rows
from fastmaf.bench.look import amount, case_rank, limit_in_words, limits_of, percent, size_in_words, value
from fastmaf.bench.rows import Row

# Medians of two runs of the same code differ by several percent on a machine that others share.
SLOWER = 1.1
# Allocations are the same from run to run, but for what the allocator keeps.
LARGER = 1.05
REGRESSION, IMPROVEMENT, MACHINE = "REGRESSION", "improvement", "machine"

_NAMED = 20  # rows that only one file has, before the others are only counted
_KEY = ("sweep", "case", "batch", "side", "features", "hidden_features", "blocks", "levels", "threads")


class Pair(NamedTuple):
    """A row of A and its like of B."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        """B's median / A's."""
        return float(self.after["median"]) / float(self.before["median"])

    @property
    def verdict(self) -> str:
        """REGRESSION, IMPROVEMENT, MACHINE or, where too little changed, nothing."""
        if max(self.ratio, 1 / self.ratio) <= (LARGER if self.before["unit"] == "GB" else SLOWER):
            return ""
        low, high = (self.before, self.after) if self.ratio > 1 else (self.after, self.before)
        if self.before["unit"] != "GB" and _percentile(high, "p20") <= _percentile(low, "p80"):
            return ""
        if self._is_machine():
            return MACHINE
        return REGRESSION if self.ratio > 1 else IMPROVEMENT

    def _is_machine(self) -> bool:
        limits = [value(row, "limit") for row in self]
        # Of other bytes or operations the limit is another one: that is the code's doing, and not the machine's.
        same_needs = self.before["must_move"] == self.after["must_move"]
        if self.before["unit"] == "GB" or not same_needs or not limits[0] or not limits[1]:
            return False
        remains = self.ratio * limits[0] / limits[1]
        return remains <= SLOWER if self.ratio > 1 else remains >= 1 / SLOWER


def compare(before: Path, after: Path) -> tuple[str, list[str]]:
    """Compares the runs of two CSV files.

    Args:
        before: called A.
        after: called B.

    Returns:
        A table, the worst ratios first, beneath what differs between the machines and the runs; and a line for each
        regression.

    Raises:
        NotABenchError: a file is no CSV of the benchmark.
        OSError: a file cannot be read.
    """
    (old, old_about), (new, new_about) = rows.read(before), rows.read(after)
    a, b = _by_key(old), _by_key(new)
    pairs = [Pair(a[key], b[key]) for key in a if key in b]
    pairs.sort(key=lambda pair: (-pair.ratio, case_rank(pair.before["case"], pair.before["batch"])))
    where = _where(old, old_about), _where(new, new_about)
    lines = [f"A: {before}, {_run(old_about)}", f"B: {after}, {_run(new_about)}"]
    if where[0] == where[1]:
        lines.append(f"Both were measured on {where[0]}.")
    else:
        lines.append(f"A was measured on {where[0]}; B on {where[1]}: ratios compare machines too.")
    lines += [_limits(old_about, new_about), "", *_table(pairs), "", _count(pairs)]
    lines += _lonely("A", [row for key, row in a.items() if key not in b])
    lines += _lonely("B", [row for key, row in b.items() if key not in a])
    found = [_cells(pair) for pair in pairs if pair.verdict == REGRESSION]
    return "\n".join(lines), [f"{name}: {old} → {new}, {ratio} times" for ratio, old, new, _, _, name in found]


def _by_key(run: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    return {tuple(row[column] for column in _KEY): row for row in run if value(row, "median")}


def _run(about: dict[str, str]) -> str:
    named = [f"{name} {about[name]}" for name in ("commit", "fastmaf", "torch", "python") if about.get(name)]
    return ", ".join(filter(None, [about.get("date", ""), *named])) or "of an unknown date"


def _where(run: Sequence[Row], about: dict[str, str]) -> str:
    cases = [row for row in run if not row["sweep"]] or run
    machine = about.get("card") or about.get("processor") or "an unnamed machine"
    return ", ".join(filter(None, [machine, size_in_words(cases)]))


def _limits(old: dict[str, str], new: dict[str, str]) -> str:
    """Says how the limits of the machine have changed between the runs."""
    before, after = limits_of(old), limits_of(new)
    ratios = {name: after[name] / before[name] for name in before if name in after and before[name]}
    if not ratios:
        return "The limits of the machine are not in both files: it may have been slower itself."
    each = ", ".join(f"{limit_in_words(name)} {ratio:.2f}" for name, ratio in ratios.items())
    return (
        f"This machine's limits, B / A: {each}; median {statistics.median(ratios.values()):.2f}. Below 1 it was slower."
    )


def _percentile(row: Row, column: str) -> float:
    # What was run once, or reckoned from a part, has no spread.
    return value(row, column) or float(row["median"])


def _name(row: Row) -> str:
    varied = f" at {row[row['sweep']] or 'all'} {row['sweep']}" if row["sweep"] in _KEY else ""
    return f"{' '.join(filter(None, (row['case'], row['batch'])))}, {row['side']}{varied}"


def _cells(pair: Pair) -> list[str]:
    medians = [amount(float(row["median"]), row["unit"]) for row in pair]
    shares = [value(row, "fraction_of_limit") for row in pair]
    of_limit = " → ".join("?" if share is None else percent(share) for share in shares) if any(shares) else ""
    return [f"{pair.ratio:.2f}", *medians, of_limit, pair.verdict, _name(pair.after)]


def _table(pairs: Sequence[Pair]) -> list[str]:
    if not pairs:
        return ["No row is in both files."]
    lines = [["B / A", "A", "B", "of the limit", "", "case, batch and side"], *map(_cells, pairs)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ">>>><<"  # numbers to the right, words to the left
    return [
        "  ".join(f"{text:{side}{width}}" for text, side, width in zip(line, aligned, widths, strict=True)).rstrip()
        for line in lines
    ]


def _count(pairs: Sequence[Pair]) -> str:
    counts = Counter(pair.verdict for pair in pairs)
    return (
        f"{len(pairs)} rows compared: {counts[REGRESSION]} slower or larger (REGRESSION), {counts[IMPROVEMENT]} faster "
        f"or smaller (improvement), {counts[MACHINE]} changed as the machine's limits did (machine)."
    )


def _lonely(name: str, found: Sequence[Row]) -> list[str]:
    if not found:
        return []
    names = [_name(row) for row in found[:_NAMED]] + ([f"{len(found) - _NAMED} more"] if len(found) > _NAMED else [])
    return [f"Only in {name}: {len(found)} row{'s' * (len(found) != 1)}: {'; '.join(names)}."]
