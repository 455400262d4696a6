"""Rows come back unchanged from their files, also from those of earlier versions; other files are refused by name."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fastmaf.bench import machine
from fastmaf.bench.cases import BUILD, MEMORY, Group, log_prob
from fastmaf.bench.rows import COLUMNS, Measured, NotABenchError, Row, read, write
from tests.bench.example_rows import row
from tests.bench.helpers import FILE_RATES, RATES, TINY

ABOUT = {"date": "2026-01-31", "processor": 'A "quoted", name — with µ', "torch": "2.7.1", "read_gb_per_s": "30.1"}
RESULTS = Path(__file__).parents[2] / "bench" / "results"
GROUP = Group("", TINY, 2, (), ())


def example(**others: str) -> Row:
    return row("sample", "5", "naive, compiled", 0.5, 0.001, note="extrapolated: 1,000 of 86,016 passes", **others)


def test_a_row_has_every_column_and_the_measured_numbers() -> None:
    result = Measured(GROUP, log_prob(5), "naive", [0.5, 0.25, 1.0], 2.0, 2.5, "a note", 3.21e-7).row(RATES)
    names = {"case": "log_prob", "batch": "5", "library": "naive", "features": "48", "hidden_features": "16x16"}
    names |= {"blocks": "2", "threads": "2", "unit": "s", "repeats": "3", "error": "3.2e-07", "note": "a note"}
    assert tuple(result) == COLUMNS
    assert {name: result[name] for name in names} == names
    numbers = {"median": 0.5, "p20": 0.35, "p80": 0.8, "first": 2.5, "limit": 2e-6, "times_fastmaf": 2.0}
    assert {name: float(result[name]) for name in numbers} == pytest.approx(numbers)
    assert float(result["fraction_of_limit"]) == pytest.approx(4e-6)


def test_unknown_numbers_are_empty() -> None:
    result = Measured(GROUP, BUILD, "naive", [0.5]).row(RATES)
    unknown = {"sweep", "batch", "levels", "first", "times_fastmaf", "error", "note"}
    assert {name for name in COLUMNS if not result[name]} == unknown
    assert float(result["median"]) == float(result["p20"]) == float(result["p80"]) == 0.5
    assert Measured(GROUP, MEMORY[0], "naive", [0.0]).row(RATES)["fraction_of_limit"] == ""


@pytest.mark.parametrize("number", [1.23456e-9, 0.000123456, 12.3456, 123456.0])
def test_numbers_of_any_size_keep_four_digits(number: float) -> None:
    result = Measured(GROUP, BUILD, "naive", [number], number, number).row(RATES)
    for column in ("median", "p20", "p80", "first", "times_fastmaf"):
        assert float(result[column]) == pytest.approx(number, rel=1e-4)


def test_csv_and_json_hold_the_same_and_come_back(tmp_path: Path) -> None:
    rows = [example(), example(levels="16", sweep="levels"), row("load", "", "zuko", 1.0)]
    path = tmp_path / "new" / "folder" / "cpu.csv"
    write([example()] * 5, ABOUT, path)
    write(iter(rows), ABOUT, path)
    assert read(path) == (rows, ABOUT)
    held = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert (held["rows"], held["about"]) == (rows, ABOUT)
    with open(path, newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{**row, **ABOUT} for row in rows], "every row describes the machine"


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    write([example() | {"library": "fastmaf (reference)"}, example()], ABOUT, path)
    path.write_text(path.read_text(encoding="utf-8").replace(",library,", ",side,", 1), encoding="utf-8")
    rows, about = read(path)
    assert about == ABOUT
    assert rows == [example() | {"library": "fastmaf (torch)"}, example()]


def test_the_committed_results_are_read() -> None:
    rows, about = read(RESULTS / "cpu.csv")
    libraries = {row["library"] for row in rows}
    assert libraries >= {"fastmaf", "fastmaf (torch)", "naive", "dense", "nflows", "zuko", "normflows", "flowjax"}
    assert about["suite"] == "full" and not about["commit"].endswith("+changes")
    assert all(row["error"] for row in rows), "a row without a check"


def test_the_description_of_the_machine_replaces_no_column() -> None:
    assert not {*machine.describe(), *RATES, *FILE_RATES} & set(COLUMNS)


OTHERS = {
    "other.csv": (b"name,value\na,1\n", "expected a column 'sweep'; found name, value"),
    "empty.csv": (b"", "expected a column 'sweep'"),
    "old.csv": (",".join(COLUMNS[:-3]).encode() + b"\n1\n", f"expected a column '{COLUMNS[-3]}'"),
    "none.csv": (",".join(COLUMNS).encode() + b"\n", "holds no row"),
    "cut.csv": (",".join(COLUMNS).encode() + b"\n,log_prob,8\n", "longer or shorter than the first line"),
    "figure.png": (
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x07\x80\xff\xfe\x00\x01",
        "is no CSV of fastmaf bench",
    ),
    "utf16.csv": (",".join(COLUMNS).encode("utf-16"), "is no CSV of fastmaf bench"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, reason = OTHERS[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(NotABenchError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path} ") and reason in str(refused.value)
