"""README.md's tables are those of the committed run, and say what its rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmaf.bench import readme
from fastmaf.bench.rows import read
from tests.bench.rows_made import ABOUT, run

README = Path(readme.ROOT, "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_committed_run() -> None:
    again = readme.rendered(README, *read(readme.CSV))
    assert again == README, "README.md differs from bench/results/cpu.csv: make readme"


def test_every_table_stands_in_the_readme() -> None:
    assert [name for name in readme.TABLES if f"<!-- bench {name} -->" not in README] == []


def test_the_committed_run_has_every_side_and_was_of_committed_code() -> None:
    rows, about = read(readme.CSV)
    assert {row["side"] for row in rows} >= {"fastmaf", "naive", "dense", "nflows", "zuko", "normflows", "flowjax"}
    assert about["suite"] == "full" and not about["commit"].endswith("+changes")
    assert all(row["error"] for row in rows), "a row without a check"


def test_what_stands_between_the_markers_is_replaced_and_nothing_else() -> None:
    text = "before\n<!-- bench speed -->\nold\n<!-- end -->\nafter\n"
    found = readme.rendered(text, list(run()), ABOUT)
    assert found.startswith("before\n<!-- bench speed -->\n| ") and found.endswith(" |\n<!-- end -->\nafter\n")
    assert "old" not in found and readme.rendered(found, list(run()), ABOUT) == found


def test_an_unknown_table_is_refused_by_name() -> None:
    with pytest.raises(readme.NoSuchTableError, match="no table 'sped'; expected one of machine, speed"):
        readme.rendered("<!-- bench sped -->\n<!-- end -->", list(run()), ABOUT)


def test_a_changed_number_changes_the_table() -> None:
    rows = list(run())
    table = readme.speed(rows, ABOUT)
    row = next(row for row in rows if (row["sweep"], row["case"], row["side"]) == ("", "train step", "nflows"))
    row["times_fastmaf"] = "123.4"
    assert readme.speed(rows, ABOUT) != table and "123×" in readme.speed(rows, ABOUT)


def test_what_is_extrapolated_is_marked() -> None:
    rows = list(run())
    sampled = [row for row in rows if (row["sweep"], row["case"], row["side"]) == ("", "sample", "naive")]
    assert sampled and all("extrapolated" in row["note"] for row in sampled)
    lines = [line for line in readme.speed(rows, ABOUT).splitlines() if line.startswith("| Drawing")]
    assert len(lines) == len(sampled) and all("×†" in line for line in lines)
