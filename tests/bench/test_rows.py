"""Rows: what is written as CSV and JSON comes back the same, other files are refused by name, and numbers in words."""

from __future__ import annotations

import csv
import json
import random
import secrets
from pathlib import Path

import pytest

from fastmaf.bench import machine
from fastmaf.bench.rows import COLUMNS, NotABenchError, Row, digits, read, row_of, seconds, spread, write

ABOUT = {
    "date": "2026-01-31",
    "processor": 'A "quoted", name — with µ',
    "torch": "2.7.1",
    "seed": "7",
    "read_gb_per_s": "30.1",
}
NAMES = {
    "sweep": "",
    "case": "sample",
    "batch": "5",
    "side": "naive, compiled",
    "features": "48",
    "hidden_features": "16x16",
    "blocks": "2",
    "levels": "",
    "threads": "2",
    "unit": "s",
    "must_move": "1,024 MB",
    "note": "extrapolated: 1,000 of 86,016 passes",
}


def row(**others: str) -> Row:
    made = row_of(NAMES, [0.5, 0.25, 1.0], 2.0, 0.001, 2.5, 3.21e-7)
    return made | others


def test_a_row_holds_every_column_and_what_was_measured() -> None:
    found = row()
    assert tuple(found) == COLUMNS
    assert {name: found[name] for name in NAMES} == NAMES
    assert float(found["median"]) == 0.5
    assert float(found["first"]) == 2.5
    assert float(found["limit"]) == 0.001
    assert float(found["fraction_of_limit"]) == pytest.approx(0.002)
    assert float(found["times_fastmaf"]) == pytest.approx(2.0)
    assert found["repeats"] == "3"
    assert float(found["error"]) == pytest.approx(3.21e-7, rel=0.05)


def test_what_is_not_known_is_empty() -> None:
    found = row_of(NAMES, [0.5], None, None, None, None)
    assert {name for name in COLUMNS if not found[name]} == {
        "sweep", "levels", "first", "limit", "fraction_of_limit", "times_fastmaf", "error",
    }  # fmt: skip
    assert float(found["median"]) == float(found["p20"]) == float(found["p80"]) == 0.5
    assert found["repeats"] == "1"


def test_numbers_of_any_size_keep_four_digits() -> None:
    for value in (1.23456e-9, 0.000123456, 0.123456, 12.3456, 123456.0):
        found = row_of(NAMES, [value], value, value / 3, value, 1e-7)
        for column in ("median", "p20", "p80", "first"):
            assert float(found[column]) == pytest.approx(value, rel=1e-4)
        assert float(found["limit"]) == pytest.approx(value / 3, rel=1e-4)
        assert float(found["fraction_of_limit"]) == pytest.approx(1 / 3, rel=1e-4)
        assert float(found["times_fastmaf"]) == pytest.approx(value, rel=1e-4)


def test_a_row_that_took_nothing_is_a_row() -> None:
    """A flow may take no memory that shows, where importing had taken and freed more."""
    found = row_of(NAMES | {"unit": "GB"}, [0.0], None, 1e-5, None, 0.0)
    assert float(found["median"]) == 0 and found["fraction_of_limit"] in ("", "inf")
    assert float(found["error"]) == 0


def test_the_spread_of_some_values() -> None:
    assert spread([7.0]) == (7, 7, 7)
    assert spread([1.0, 2.0]) == (1.5, pytest.approx(1.2), pytest.approx(1.8))
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3, pytest.approx(1.8), pytest.approx(4.2))
    assert spread([0.0, 0.0, 0.0]) == (0, 0, 0)
    assert spread(list(range(101))) == (50, pytest.approx(20), pytest.approx(80))


def test_the_spread_lies_among_the_values_in_order() -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(200):
        values = [draw.lognormvariate(0, 2) for _ in range(draw.randint(1, 9))]
        median, p20, p80 = spread(values)
        assert min(values) <= p20 <= median <= p80 <= max(values)


def test_csv_and_json_hold_the_same_and_come_back(tmp_path: Path) -> None:
    written = [row(), row(side="zuko", levels="16", threads="1", sweep="levels", note=""), row(case="load", batch="")]
    path = tmp_path / "new" / "folder" / "cpu.csv"
    write(written, ABOUT, path)
    assert read(path) == (written, ABOUT)
    held = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert (held["rows"], held["about"]) == (written, ABOUT)
    with open(path, newline="", encoding="utf-8") as file:
        plain = list(csv.DictReader(file))
    assert plain == [{**one, **ABOUT} for one in written], "every row says what it was measured on"
    assert list(plain[0]) == [*COLUMNS, *ABOUT]


def test_an_iterator_of_rows_is_written_to_both_files(tmp_path: Path) -> None:
    write(iter([row(), row()]), ABOUT, tmp_path / "a.csv")
    assert len(read(tmp_path / "a.csv")[0]) == 2
    assert len(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["rows"]) == 2


def test_rows_are_written_over_those_of_an_older_run(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write([row(), row(), row()], ABOUT, path)
    write([row(side="dense")], ABOUT, path)
    assert [one["side"] for one in read(path)[0]] == ["dense"]


@pytest.mark.parametrize("name", ["threads", "side", "median"])
def test_nothing_about_the_machine_takes_the_place_of_a_column(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=name):
        write([row()], ABOUT | {name: "2"}, tmp_path / "a.csv")


def test_what_a_run_says_about_its_machine_takes_no_column() -> None:
    assert not set(machine.describe()) & set(COLUMNS)


def test_no_row_is_no_run(tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    write([], ABOUT, path)
    with pytest.raises(NotABenchError, match=r"none\.csv holds no row"):
        read(path)


OTHERS = {
    "other.csv": b"name,value\na,1\n",
    "empty.csv": b"",
    "text.csv": b"This is a text.\n",
    "old.csv": ",".join(COLUMNS[:-3]).encode() + b"\n" + b"," * (len(COLUMNS) - 4) + b"\n",
    "figure.png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x07\x80\xff\xfe\x00\x01",
    "rows.json": b'{\n "about": {},\n "rows": []\n}\n',
    "utf16.csv": ",".join(COLUMNS).encode("utf-16"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(OTHERS[name])
    with pytest.raises(NotABenchError) as refused:
        read(path)
    assert str(path) in str(refused.value)


def test_a_file_of_an_older_suite_is_told_which_column_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_bytes(OTHERS["old.csv"])
    with pytest.raises(NotABenchError, match=f"'{COLUMNS[-3]}'"):
        read(path)


def test_a_file_that_was_cut_is_refused_by_name(tmp_path: Path) -> None:
    """As by a full disk in the middle of a row: what lacks is not "" but nothing, and no caller expects that."""
    path = tmp_path / "cut.csv"
    write([row(), row()], ABOUT, path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.rindex("sample") + 20], encoding="utf-8")
    with pytest.raises(NotABenchError) as refused:
        read(path)
    assert str(path) in str(refused.value)


def test_a_missing_file_is_an_error_of_the_operating_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing.csv")


def test_columns_in_another_order_are_read_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "turned.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*ABOUT, *reversed(COLUMNS)])
        writer.writeheader()
        writer.writerow(row() | ABOUT)
    assert read(path) == ([row()], ABOUT)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0.00 µs"),
        (1.5e-7, "0.15 µs"),
        (1e-6, "1.00 µs"),
        (9.991e-6, "9.99 µs"),
        (9.999e-6, "10.0 µs"),
        (1.2345e-4, "123 µs"),
        (1e-3, "1.00 ms"),
        (0.0321, "32.1 ms"),
        (0.5, "500 ms"),
        (1.0, "1.00 s"),
        (59.99, "60.0 s"),
        (671.4, "671 s"),
        (1_670.0, "1,670 s"),
    ],
)
def test_times_in_words(value: float, words: str) -> None:
    assert seconds(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0.00"),
        (0.5, "0.50"),
        (1.0, "1.00"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (42.0, "42.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (86_016.0, "86,016"),
    ],
)
def test_numbers_in_words(value: float, words: str) -> None:
    assert digits(value) == words


@pytest.mark.parametrize("value", [0.0312, 0.00412, 0.000567])
def test_small_numbers_keep_a_digit_that_counts(value: float) -> None:
    """A flow of 4 MB does not take "0.00 GB", nor is what takes a two-hundredth of fastmaf's time "0.00 ×"."""
    assert float(digits(value)) == pytest.approx(value, rel=0.1)
