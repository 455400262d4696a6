"""Comparing two runs: which rows are slower or faster, and which changed with the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmaf.bench import rows
from fastmaf.bench.compare import IMPROVEMENT, MACHINE, REGRESSION, Pair, compare
from fastmaf.bench.rows import Row
from tests.bench.example_rows import ABOUT, row


def timed(median: float, limit: float | None = None, **others: str) -> Row:
    return row("train step", "8", "fastmaf", median, limit, **others)


def held(median: float) -> Row:
    return row("training memory", "8", "fastmaf", median, 1.0, unit="GB", p20="", p80="")


def comparison(
    tmp_path: Path,
    before: list[Row],
    after: list[Row],
    was: dict[str, str] | None = None,
    now: dict[str, str] | None = None,
) -> tuple[list[str], list[str]]:
    """Returns the lines of the table and the regressions."""
    rows.write(before, ABOUT if was is None else was, tmp_path / "a.csv")
    rows.write(after, ABOUT if now is None else now, tmp_path / "b.csv")
    text, regressions = compare(tmp_path / "a.csv", tmp_path / "b.csv")
    return text.splitlines(), regressions


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (timed(1.0), timed(1.0), ""),
        (timed(1.0), timed(1.3), REGRESSION),
        (timed(1.3), timed(1.0), IMPROVEMENT),
        # the spreads do not meet, but the medians hardly differ
        (timed(1.0, p80="1.01"), timed(1.09, p20="1.08"), ""),
        (timed(1.09, p20="1.08"), timed(1.0, p80="1.01"), ""),
        # the medians differ, but the spreads meet
        (timed(1.0, p80="1.25"), timed(1.3, p20="1.2"), ""),
        (timed(1.3, p20="1.2"), timed(1.0, p80="1.25"), ""),
        (timed(1.0, p80="1.15"), timed(1.3, p20="1.2"), REGRESSION),
        # what was run once has no spread
        (timed(1.0, p20="", p80=""), timed(1.2, p20="", p80=""), REGRESSION),
        (timed(1.2, p20="", p80=""), timed(1.0, p20="", p80=""), IMPROVEMENT),
        (held(1.0), held(1.04), ""),
        (held(1.0), held(1.06), REGRESSION),
        (held(1.06), held(1.0), IMPROVEMENT),
        # the limit took as much longer as the row did: the machine
        (timed(1.0, 0.5), timed(1.3, 0.65), MACHINE),
        (timed(1.0, 0.5), timed(1.3, 0.62), MACHINE),
        (timed(1.3, 0.65), timed(1.0, 0.5), MACHINE),
        (timed(1.0, 0.5), timed(1.3, 0.9), MACHINE),
        (timed(1.3, 0.65), timed(1.0, 0.52), MACHINE),
        # the limit took longer, the row longer still
        (timed(1.0, 0.5), timed(1.3, 0.55), REGRESSION),
        (timed(1.3, 0.55), timed(1.0, 0.5), IMPROVEMENT),
        # the limit is the same, just past the threshold too
        (timed(1.0, 0.5), timed(1.3, 0.5), REGRESSION),
        (timed(1.0, 0.5, p80="1"), timed(1.104, 0.5, p20="1.104"), REGRESSION),
        # more bytes move than before: the code, and not the machine
        (timed(1.0, 0.5), timed(1.3, 0.65, must_move="349 MB"), REGRESSION),
        # in memory the limit is no rate
        (held(1.0), held(1.3) | {"limit": "1.3"}, REGRESSION),
    ],
)
def test_verdict(before: Row, after: Row, verdict: str) -> None:
    assert Pair(before, after).verdict == verdict


def test_the_worst_comes_first_with_what_was_before_and_after(tmp_path: Path) -> None:
    before = [timed(0.1), row("log_prob", "8", "fastmaf", 0.02, 0.01), row("sample", "1", "naive", 600.0), held(1.0)]
    after = [timed(0.1), row("log_prob", "8", "fastmaf", 0.03, 0.01), row("sample", "1", "naive", 300.0), held(1.2)]
    lines, regressions = comparison(tmp_path, before, after)
    start = next(i for i, line in enumerate(lines) if line.startswith("B / A"))
    table = [line.split("  ") for line in lines[start + 1 : start + 5]]
    assert [[cell.strip() for cell in line if cell] for line in table] == [
        ["1.50", "20.0 ms", "30.0 ms", "50 % → 33 %", REGRESSION, "log_prob 8, fastmaf"],
        ["1.20", "1.00 GB", "1.20 GB", "100 % → 83 %", REGRESSION, "training memory 8, fastmaf"],
        ["1.00", "100 ms", "100 ms", "train step 8, fastmaf"],
        ["0.50", "600 s", "300 s", IMPROVEMENT, "sample 1, naive"],
    ]
    assert regressions == [
        "log_prob 8, fastmaf: 20.0 ms → 30.0 ms, 1.50 times",
        "training memory 8, fastmaf: 1.00 GB → 1.20 GB, 1.20 times",
    ]
    assert any("4 rows compared: 2 slower or larger" in line and "1 faster" in line for line in lines)


def test_rows_are_matched_by_size_and_sweep_and_not_by_place(tmp_path: Path) -> None:
    sizes: list[dict[str, str]] = [
        {},
        {"features": "768"},
        {"features": "3072"},
        {"blocks": "5"},
        {"levels": "16"},
        {"threads": "1"},
    ]
    sizes += [
        {"hidden_features": "64x64"},
        {"sweep": "features"},
        {"batch": "64"},
        {"library": "naive"},
        {"case": "epoch"},
    ]
    before = [timed(1.0 + i) | size for i, size in enumerate(sizes)]
    lines, regressions = comparison(tmp_path, before, before[::-1])
    assert sum(line.strip().startswith("1.00") for line in lines) == len(sizes) and not regressions


def test_a_row_of_a_sweep_says_where_it_lies(tmp_path: Path) -> None:
    swept = [timed(1.0, sweep="features", features="768"), timed(1.0, sweep="levels")]
    slower = [timed(2.0, sweep="features", features="768"), timed(3.0, sweep="levels")]
    _, regressions = comparison(tmp_path, swept, slower)
    assert [line.split(":")[0] for line in regressions] == [
        "train step 8, fastmaf at all levels",
        "train step 8, fastmaf at 768 features",
    ]


def test_the_limits_of_the_machine_are_comparison(tmp_path: Path) -> None:
    now = ABOUT | {
        "read_gb_per_s": "31.7",
        "adam_gb_per_s": "23",
        "write_file_gb_per_s": "0.6",
        "sgemm_gflop_per_s": "none",
    }
    lines, _ = comparison(tmp_path, [timed(1.0)], [timed(1.0)], now=now)
    (line,) = [line for line in lines if line.startswith("Limits of the machine, B / A")]
    assert (
        "read 0.93, copy 1.00, fused Adam 0.50, writing files 0.50, reading files 1.00; median 0.93" in line
        and "matrix" not in line
    )
    lines, _ = comparison(tmp_path, [timed(1.0)], [timed(1.0)], now={})
    assert any("limits of the machine are not in both files" in line for line in lines)


def test_other_machines_are_said_first(tmp_path: Path) -> None:
    lines, _ = comparison(tmp_path, [timed(1.0)], [timed(1.0)])
    assert lines[0].startswith(f"A: {tmp_path / 'a.csv'}, 2026-01-31, commit abc1234")
    assert lines[2].startswith("Both were measured on Some Processor 1234") and "2 threads" in lines[2]
    for after, now in (
        ([timed(1.0)], ABOUT | {"processor": "Another"}),
        ([timed(1.0, threads="4")], ABOUT),
        ([timed(1.0, features="768")], ABOUT),
    ):
        lines, _ = comparison(tmp_path, [timed(1.0)], after, now=now)
        assert lines[2].startswith("A was measured on Some Processor 1234") and "; B on " in lines[2]
        assert lines[2].endswith("ratios compare the machines too.")


def test_rows_of_one_file_are_counted_and_named(tmp_path: Path) -> None:
    more = [row("log_prob", "8", f"library {i}", 1.0) for i in range(23)]
    lines, _ = comparison(tmp_path, [timed(1.0), row("epoch", "", "naive", 9.0)], [timed(1.0), *more])
    assert "Only in A: 1 row: epoch, naive." in lines
    (line,) = [line for line in lines if line.startswith("Only in B: 23 rows: log_prob 8, library 0;")]
    assert line.endswith("log_prob 8, library 19; 3 more.")
    lines, _ = comparison(tmp_path, [timed(1.0)], [timed(1.0)])
    assert not any(line.startswith("Only in") for line in lines)


def test_a_row_without_a_median_is_no_row(tmp_path: Path) -> None:
    lines, regressions = comparison(tmp_path, [timed(1.0), held(1.0)], [timed(1.0), held(1.0) | {"median": ""}])
    assert "Only in A: 1 row: training memory 8, fastmaf." in lines and not regressions


def test_nothing_in_both(tmp_path: Path) -> None:
    lines, regressions = comparison(tmp_path, [timed(1.0)], [held(1.0)])
    assert "No row is in both files." in lines and not regressions


def test_other_files_are_refused(tmp_path: Path) -> None:
    rows.write([timed(1.0)], ABOUT, tmp_path / "a.csv")
    (tmp_path / "other.csv").write_text("name,age\nx,1\n")
    with pytest.raises(rows.NotABenchError, match="is no CSV of fastmaf bench"):
        compare(tmp_path / "a.csv", tmp_path / "other.csv")
    with pytest.raises(FileNotFoundError):
        compare(tmp_path / "missing.csv", tmp_path / "a.csv")
