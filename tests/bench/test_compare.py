"""Comparing two runs: which rows are slower or faster, and which changed with the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmaf.bench import rows
from fastmaf.bench.compare import IMPROVEMENT, MACHINE, REGRESSION, Pair, compare
from fastmaf.bench.rows import Row
from tests.bench.example_rows import ABOUT, row


def timed(median: float, limit: float | None = None, **others: str) -> Row:
    return row("train step", "8", "fastmaf", median, limit, **others)


def held(median: float, limit: float = 1.0) -> Row:
    return row("training memory", "8", "fastmaf", median, limit, unit="GB", p20="", p80="")


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (timed(1.0), timed(1.0), ""),
        (timed(1.0), timed(1.3), REGRESSION),
        # the spreads do not overlap, but the medians hardly differ
        (timed(1.0, p80="1.01"), timed(1.09, p20="1.08"), ""),
        # the medians differ, but the spreads overlap
        (timed(1.0, p80="1.25"), timed(1.3, p20="1.2"), ""),
        (timed(1.0, p80="1.15"), timed(1.3, p20="1.2"), REGRESSION),
        # what was run once has no spread
        (timed(1.0, p20="", p80=""), timed(1.2, p20="", p80=""), REGRESSION),
        (held(1.0), held(1.04), ""),
        (held(1.0), held(1.06), REGRESSION),
        # the limit changed as much as the row: the machine
        (timed(1.0, 0.5), timed(1.3, 0.65), MACHINE),
        (timed(1.0, 0.5), timed(1.3, 0.9), MACHINE),
        # the limit changed less
        (timed(1.0, 0.5), timed(1.3, 0.55), REGRESSION),
        (timed(1.0, 0.5, p80="1"), timed(1.104, 0.5, p20="1.104"), REGRESSION),
        # more bytes are moved than before: the code
        (timed(1.0, 0.5), timed(1.3, 0.65, must_move="349 MB"), REGRESSION),
        # the limit of memory does not depend on the machine
        (held(1.0), held(1.3, 1.3), REGRESSION),
    ],
)
def test_verdict(before: Row, after: Row, verdict: str) -> None:
    assert Pair(before, after).verdict == verdict
    reverse = {REGRESSION: IMPROVEMENT}.get(verdict, verdict)
    if after["must_move"] == before["must_move"]:
        assert Pair(after, before).verdict == reverse


Comparison = Callable[..., tuple[list[str], bool]]


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Returns the lines of a comparison, and whether there is a regression."""

    def call(before: list[Row], after: list[Row], now: dict[str, str] = ABOUT) -> tuple[list[str], bool]:
        rows.write(before, ABOUT, tmp_path / "a.csv")
        rows.write(after, now, tmp_path / "b.csv")
        result = compare(tmp_path / "a.csv", tmp_path / "b.csv")
        return result.text.splitlines(), result.has_regression

    return call


def test_the_worst_comes_first_with_both_values(comparison: Comparison) -> None:
    before = [timed(0.1), row("log_prob", "8", "fastmaf", 0.02, 0.01), row("sample", "1", "naive", 600.0), held(1.0)]
    after = [timed(0.1), row("log_prob", "8", "fastmaf", 0.03, 0.01), row("sample", "1", "naive", 300.0), held(1.2)]
    lines, worse = comparison(before, after)
    start = next(i for i, line in enumerate(lines) if line.startswith("B / A"))
    assert [[cell.strip() for cell in line.split("  ") if cell] for line in lines[start + 1 : start + 5]] == [
        ["1.50", "20.0 ms", "30.0 ms", "50% → 33%", REGRESSION, "log_prob 8, fastmaf"],
        ["1.20", "1.00 GB", "1.20 GB", "100% → 83%", REGRESSION, "training memory 8, fastmaf"],
        ["1.00", "100 ms", "100 ms", "train step 8, fastmaf"],
        ["0.50", "600 s", "300 s", IMPROVEMENT, "sample 1, naive"],
    ]
    assert worse
    assert any("4 rows compared: 2 slower or larger" in line and "1 faster" in line for line in lines)


def test_the_rows_as_json(tmp_path: Path) -> None:
    rows.write([timed(0.1), held(1.0)], ABOUT, tmp_path / "a.csv")
    rows.write([timed(0.1), held(1.2)], ABOUT, tmp_path / "b.csv")
    content = json.loads(json.dumps(compare(tmp_path / "a.csv", tmp_path / "b.csv").to_json(), allow_nan=False))
    assert content["regression"] is True
    assert [(row["case"], row["verdict"], row["a"], row["b"]) for row in content["rows"]] == [
        ("training memory", "regression", 1.0, 1.2),
        ("train step", "same", 0.1, 0.1),
    ]


def test_rows_are_matched_by_case_size_and_sweep(comparison: Comparison) -> None:
    changes = [{}, {"features": "768"}, {"blocks": "5"}, {"levels": "16"}, {"threads": "1"}, {"sweep": "small"}]
    changes += [{"hidden_features": "64x64"}, {"sweep": "features"}, {"batch": "64"}, {"library": "naive"}]
    before = [timed(1.0 + i) | change for i, change in enumerate(changes)]
    lines, worse = comparison(before, before[::-1])
    assert sum(line.strip().startswith("1.00") for line in lines) == len(changes) and not worse
    swept = [timed(1.0, sweep="features", features="768"), timed(1.0, sweep="levels")]
    swept += [timed(1.0, sweep="small", features="6")]
    lines, worse = comparison(swept, [slow | {"median": "2", "p20": "2", "p80": "2"} for slow in swept])
    assert worse and [line.split(REGRESSION)[1].strip() for line in lines if f"  {REGRESSION}  " in line] == [
        "train step 8, fastmaf at 768 features",
        "train step 8, fastmaf at all levels",
        "train step 8, fastmaf at 6 features",
    ]


def test_the_machines_are_compared(comparison: Comparison) -> None:
    same = [timed(1.0)]
    now = ABOUT | {"read_gb_per_s": "31.7", "adam_gb_per_s": "23", "write_file_gb_per_s": "0.6"}
    lines, _ = comparison(same, same, now)
    for line, name in zip(lines, "ab", strict=False):
        assert f"{name}.csv. Measured on Some Processor 1234 (family 25, model 1), 2 cores, with 2 threads" in line
        assert line.endswith("commit abc1234, torch 2.7.1, python 3.11.7, nflows 0.14, zuko 1.6.0.")
    assert lines[2].startswith(
        "Limits of the machine, B / A: read 0.93, copy 1.00, fused Adam 0.50, matrix product 1.00, writing files 0.50, "
        "reading files 1.00; median 0.96"
    )
    lines, _ = comparison(same, same, {})
    assert "The machines differ: ratios compare them too." in lines
    assert any("The limits of the machine are not in both files" in line for line in lines)
    for name in ("processor", "torch_threads"):
        assert "The machines differ: ratios compare them too." in comparison(same, same, ABOUT | {name: "4"})[0]


def test_rows_of_only_one_file_are_counted_and_named(comparison: Comparison) -> None:
    more = [row("log_prob", "8", f"library {i}", 1.0) for i in range(23)]
    lines, _ = comparison([timed(1.0), row("epoch", "", "naive", 9.0)], [timed(1.0), *more])
    assert "Only in A: 1 row: epoch, naive." in lines
    (line,) = [line for line in lines if line.startswith("Only in B: 23 rows: log_prob 8, library 0;")]
    assert line.endswith("log_prob 8, library 22.")
    lines, worse = comparison([timed(1.0), held(1.0)], [timed(1.0), held(1.0) | {"median": ""}])
    assert "Only in A: 1 row: training memory 8, fastmaf." in lines and not worse
    lines, worse = comparison([timed(1.0)], [held(1.0)])
    assert "No row is in both files." in lines and not worse
