"""Texts from strangers, drawn by hypothesis: configurations, headers, names in tables, and tables of groups."""

from __future__ import annotations

import csv
import io
import json
import math
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastmaf
from fastmaf.images.decode import DataError, load_frame
from fastmaf.images.names import from_cell, to_cell, visible
from fastmaf.inspection.workflow.groups import group_labels
from fastmaf.inspection.workflow.rows import ImageRow, written_rows
from fastmaf.io.csv_file import write_csv
from fastmaf.io.safe_json import JSONError, parse
from fastmaf.io.tensor_file import TensorFile
from tests.fuzz.images import whole_images

drawn = settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
# Names of files: any text, undecodable bytes, signs of formulas, and what separates cells.
NAMES = st.text(st.characters() | st.sampled_from("=+-@'\";,\t\r\n\\\udc80\udcff\u2028\u202e\uff1d"), max_size=12)
FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def refused_or_opened(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        with TensorFile(path) as file:
            for name in file.tensors:
                file.read(name)
    except fastmaf.CheckpointError as error:
        assert str(path) in str(error) and len(str(error)) < 1000 and str(error).isprintable()
    try:
        fastmaf.load(path)
    except fastmaf.CheckpointError as error:
        assert str(path) in str(error) and len(str(error)) < 1000 and str(error).isprintable()


@drawn
@given(content=st.binary(max_size=200))
def test_any_bytes_are_no_model(folder: Path, content: bytes) -> None:
    refused_or_opened(folder / "a.safetensors", content)
    refused_or_opened(folder / "a.safetensors", struct.pack("<Q", len(content)) + content)


@drawn
@given(header=JSON, config=JSON, data=st.binary(max_size=16))
def test_any_header_and_configuration(folder: Path, header: Any, config: Any, data: bytes) -> None:
    base = {"version": 2, "class": "MAF", "features": 2, "transforms": []}
    for document in (config, {**base, **config} if isinstance(config, dict) else {**base, "transforms": config}):
        text = json.dumps({"__metadata__": {"fastmaf": json.dumps(document)}}).encode()
        refused_or_opened(folder / "b.safetensors", struct.pack("<Q", len(text)) + text + data)
    text = json.dumps({"a": header} if not isinstance(header, dict) else header).encode()
    refused_or_opened(folder / "b.safetensors", struct.pack("<Q", len(text)) + text + data)


@drawn
@given(dtype=st.sampled_from(["F32", "BOOL", "F64", "U8", "?"]), shape=st.lists(st.integers(-1, 2**63), max_size=4),
       offsets=st.lists(st.integers(-1, 2**63), max_size=3), data=st.binary(max_size=16))  # fmt: skip
def test_any_shape_and_range(folder: Path, dtype: str, shape: list[int], offsets: list[int], data: bytes) -> None:
    text = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    refused_or_opened(folder / "c.safetensors", struct.pack("<Q", len(text)) + text + data)


@drawn
@given(text=st.text(max_size=40) | JSON.map(json.dumps))
def test_any_text_is_json_or_an_error_that_names_it(text: str) -> None:
    try:
        parse(text, "record")
    except JSONError as error:
        assert str(error).startswith(("record", "the key", "record:")) or "record" in str(error)


@drawn
@given(content=st.binary(max_size=300), kind=st.sampled_from(sorted(whole_images())))
def test_any_bytes_are_no_image(folder: Path, content: bytes, kind: str) -> None:
    for start in (b"", whole_images()[kind][:40]):
        (path := folder / kind).write_bytes(start + content)
        try:
            assert load_frame(path, 3).pixels.shape == (3, 3, 3)
        except DataError as error:
            assert str(path) in str(error)


@drawn
@given(rows=st.lists(st.tuples(NAMES, NAMES), min_size=1, max_size=5))
def test_no_cell_of_a_table_is_a_formula_and_names_come_back(folder: Path, rows: list[tuple[str, str]]) -> None:
    write_csv(folder / "a.csv", ("file", "label"), [tuple(map(to_cell, row)) for row in rows])
    text = (folder / "a.csv").read_bytes().decode("utf-8", "surrogateescape")
    assert len(text.split("\n")) == len(rows) + 2, "a row is a line"
    cells = list(csv.reader(io.StringIO(text)))[1:]
    assert [tuple(map(from_cell, row)) for row in cells] == rows
    for cell in (cell for row in cells for cell in row):
        for part in cell.split(";"):  # the separator in some locales
            assert not part.lstrip(" ").startswith(FORMULAS)


@drawn
@given(name=NAMES, numbers=st.lists(st.floats(), min_size=5, max_size=5), kind=st.sampled_from([".csv", ".jsonl"]))
def test_rows_of_scores(folder: Path, name: str, numbers: list[float], kind: str) -> None:
    """JSON has no notation for NaN and infinities: they are null there."""
    score, p_value, nll, decode_ms, latency_ms = numbers
    out = folder / f"rows{kind}"
    with written_rows(out) as write:
        write(ImageRow(name, score, p_value, "good", nll, decode_ms, latency_ms))
    text = out.read_bytes().decode("utf-8", "surrogateescape")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    if kind == ".jsonl":
        (line,) = text.splitlines()
        row = json.loads(line, parse_constant=refuse)
        assert row["file"] == name
        assert row["score"] == score if math.isfinite(score) else row["score"] is None
    else:
        (found,) = csv.DictReader(io.StringIO(text))
        assert from_cell(found["file"]) == name and not found["file"].startswith(FORMULAS)


@drawn
@given(name=NAMES)
def test_what_is_shown_moves_no_cursor(name: str) -> None:
    shown = visible(name)
    shown.encode()
    assert not any(ord(c) < 32 or c in "\u202e\u2028\x7f" for c in shown)


@drawn
@given(content=st.binary(max_size=80) | st.text("file,group\n\r\"';a.png\x00", max_size=80).map(str.encode))
def test_any_table_of_groups(folder: Path, content: bytes) -> None:
    (path := folder / "groups.csv").write_bytes(content)
    for start in (b"", b"file,group\n"):
        path.write_bytes(start + content)
        try:
            assert len(group_labels(str(path), ["a.png", "a"])) == 2
        except DataError as error:
            assert str(path) in str(error)
