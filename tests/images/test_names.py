"""Names that hold anything, as CSV cells and on a terminal."""

from __future__ import annotations

import csv
import io

import pytest

from fastmaf.images.names import from_cell, to_cell, visible

FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\uff1d1", "a;=1", "a; @b")
BREAKS = ("a\rb", "a\nb", "a\r\nb", "\ta", "a\x1b[31mb", "\x85", "a\u2028b", "\x00", "'=\\x0d\n'")
PLAIN = ("a.png", r"C:\new\a.png", "a b", "a-b+c=d@e", "müller 検査", "a'b", 'a"b,c', "bad\udcff", "a;b", "")


@pytest.mark.parametrize("name", FORMULAS + BREAKS + ("'", "'=1", "'a\\", "=bad\udcff", "'\\x41"))
def test_a_name_that_does_something_becomes_text(name: str) -> None:
    cell = to_cell(name)
    assert cell.startswith("'") and cell.splitlines() == [cell] and ";=" not in cell.replace(" ", "")
    assert all(c >= " " and c not in "\x7f\x85\u2028" for c in cell)
    assert from_cell(cell) == name


@pytest.mark.parametrize("name", PLAIN)
def test_every_other_name_is_its_own_cell(name: str) -> None:
    assert to_cell(name) == name == from_cell(name)


def test_a_stream_that_holds_no_bytes_gets_them_written_out() -> None:
    assert to_cell("bad\udcff.png", keep_bytes=False) == r"'bad\udcff.png"
    assert from_cell(r"'bad\udcff.png") == "bad\udcff.png"


def test_no_two_names_share_a_cell() -> None:
    names = [*FORMULAS, *BREAKS, *PLAIN, "'=1+1", r"a\x0db", r"'a\x0db"]
    assert len({to_cell(name) for name in names}) == len(names)


def test_what_a_csv_reader_gives_back() -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([to_cell(name), "1"] for name in FORMULAS + BREAKS + PLAIN)
    rows = list(csv.reader(io.StringIO(text.getvalue())))
    assert [from_cell(cell) for cell, _ in rows] == [*FORMULAS, *BREAKS, *PLAIN]
    assert len(text.getvalue().splitlines()) == len(rows)


def test_a_terminal_obeys_no_name() -> None:
    assert visible("a\x1b[2Jb\r\n") == r"a\x1b[2Jb\x0d\x0a"
    assert visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert visible("x\udcff") == r"x\xff" and visible("検査 a") == "検査 a"
