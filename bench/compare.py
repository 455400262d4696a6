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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastmaf.bench import rows
from fastmaf.bench.labels import amount, case_rank, limit_in_words, limits_of, percent, size_in_words
from fastmaf.bench.rows import Row, value
from fastmaf.bench.tables import aligned

SLOWER = 1.1  # medians of two runs of the same code differ by several percent on a shared machine
LARGER = 1.05  # allocations are the same from run to run, apart from what the allocator keeps
REGRESSION, IMPROVEMENT, MACHINE = "REGRESSION", "improvement", "machine"

_NAMED = 20  # rows of only one file that are named; the others are counted
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
        ratio, memory = self.ratio, self.before["unit"] == "GB"
        if max(ratio, 1 / ratio) <= (LARGER if memory else SLOWER):
            return ""
        low, high = (self.before, self.after) if ratio > 1 else (self.after, self.before)
        if not memory and _percentile(high, "p20") <= _percentile(low, "p80"):
            return ""
        if not memory and self._is_machine():
            return MACHINE
        return REGRESSION if ratio > 1 else IMPROVEMENT

    def _is_machine(self) -> bool:
        before, after = (value(row, "limit") for row in self)
        if self.before["must_move"] != self.after["must_move"] or not before or not after:
            return False  # the limit of other bytes or operations is due to the code
        rest = self.ratio * before / after
        return rest <= SLOWER if self.ratio > 1 else rest >= 1 / SLOWER


def compare(before: Path, after: Path) -> tuple[str, list[str]]:
    """Compares the runs of two CSV files, A and B.

    Returns:
        A table, the worst ratios first, below a comparison of the machines; and a line for each regression.

    Raises:
        NotABenchError: a file is no CSV of the benchmark.
        OSError: a file cannot be read.
    """
    (old, old_about), (new, new_about) = rows.read(before), rows.read(after)
    a, b = _by_key(old), _by_key(new)
    pairs = [Pair(a[key], b[key]) for key in a if key in b]
    pairs.sort(key=lambda pair: (-pair.ratio, case_rank(pair.before["case"], pair.before["batch"])))
    places = _machine(old, old_about), _machine(new, new_about)
    lines = [f"A: {before}, {_versions(old_about)}", f"B: {after}, {_versions(new_about)}"]
    if places[0] == places[1]:
        lines.append(f"Both were measured on {places[0]}.")
    else:
        lines.append(f"A was measured on {places[0]}; B on {places[1]}: ratios compare the machines too.")
    counts = Counter(pair.verdict for pair in pairs)
    head = ["B / A", "A", "B", "of the limit", "", "case, batch and library"]
    lines += [_limits(old_about, new_about), ""]
    lines += aligned([head, *map(_cells, pairs)], (4, 5)) if pairs else ["No row is in both files."]
    lines += [
        "",
        f"{len(pairs)} rows compared: {counts[REGRESSION]} slower or larger (REGRESSION), {counts[IMPROVEMENT]} "
        f"faster or smaller (improvement), {counts[MACHINE]} changed as the machine's limits did (machine).",
        *_only_in("A", [row for key, row in a.items() if key not in b]),
        *_only_in("B", [row for key, row in b.items() if key not in a]),
    ]
    regressions = [_cells(pair) for pair in pairs if pair.verdict == REGRESSION]
    return "\n".join(lines), [f"{name}: {old} → {new}, {ratio} times" for ratio, old, new, _, _, name in regressions]


def _by_key(run: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    return {tuple(row[column] for column in _KEY): row for row in run if value(row)}


def _versions(about: dict[str, str]) -> str:
    versions = [f"{name} {about[name]}" for name in ("commit", "fastmaf", "torch", "python") if about.get(name)]
    return ", ".join(filter(None, [about.get("date"), *versions])) or "of unknown date"


def _machine(run: Sequence[Row], about: dict[str, str]) -> str:
    cases = [row for row in run if not row["sweep"]] or run
    machine = about.get("card") or about.get("processor") or "an unknown machine"
    return ", ".join(filter(None, [machine, size_in_words(cases)]))


def _limits(old: dict[str, str], new: dict[str, str]) -> str:
    before, after = limits_of(old), limits_of(new)
    ratios = {name: after[name] / before[name] for name in before if after.get(name) and before[name]}
    if not ratios:
        return "The limits of the machine are not in both files: the machine itself may have been slower."
    each = ", ".join(f"{limit_in_words(name)} {ratio:.2f}" for name, ratio in ratios.items())
    return f"Limits of the machine, B / A: {each}; median {statistics.median(ratios.values()):.2f} (below 1: slower)."


def _percentile(row: Row, column: str) -> float:
    return value(row, column) or float(row["median"])  # what was run once has no spread


def _name(row: Row) -> str:
    sweep = f" at {row[row['sweep']] or 'all'} {row['sweep']}" if row["sweep"] in _KEY else ""
    return f"{' '.join(filter(None, (row['case'], row['batch'])))}, {row['library']}{sweep}"


def _cells(pair: Pair) -> list[str]:
    medians = [amount(float(row["median"]), row["unit"]) for row in pair]
    shares = [value(row, "fraction_of_limit") for row in pair]
    of_limit = " → ".join("?" if share is None else percent(share) for share in shares) if any(shares) else ""
    return [f"{pair.ratio:.2f}", *medians, of_limit, pair.verdict, _name(pair.after)]


def _only_in(name: str, only: Sequence[Row]) -> list[str]:
    if not only:
        return []
    names = [_name(row) for row in only[:_NAMED]] + ([f"{len(only) - _NAMED} more"] if len(only) > _NAMED else [])
    return [f"Only in {name}: {len(only)} row{'s' * (len(only) != 1)}: {'; '.join(names)}."]
