"""The header of a safetensors file: its length, its JSON, and where the tensors lie."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastmaf
from fastmaf.io.tensor_file import Streamed, TensorFile, read_tensors, write_tensors

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


def content(header: Any, data: bytes = b"\0" * 4, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


FILES: dict[str, tuple[bytes, str]] = {
    "no length": (b"\x02\0\0", "it has 3 bytes"),
    "length beyond the file": (
        content({"a": ONE}, length=2**32),
        "its header would take 4294967296 bytes; expected at most",
    ),
    "largest length": (content({"a": ONE}, length=2**64 - 1), "its header would take 18446744073709551615 bytes"),
    "no UTF-8": (struct.pack("<Q", 4) + b'{"\xff"', "its header is not UTF-8 text"),
    "no JSON": (content("{"), "header: not valid JSON"),
    "no object": (content([1]), "header: expected an object"),
    "nested": (content(DEEP), "header: nested more than 32 deep"),
    "name twice": (content(f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(ONE)}}}'), "the key 'a' appears twice"),
    "unknown dtype": (content({"a": {**ONE, "dtype": "F31"}}), "header.a.dtype: expected one of"),
    "dtype of a list": (content({"a": {**ONE, "dtype": []}}), "header.a.dtype: expected one of"),
    "fraction": (content({"a": {**ONE, "shape": [1.0]}}), r"header.a.shape\[0\]: expected a whole number"),
    "negative": (content({"a": {**ONE, "shape": [-1]}}), r"header.a.shape\[0\]: expected a whole number"),
    "no offsets": (content({"a": {"dtype": "F32", "shape": [1]}}), "header.a: the entry 'data_offsets' is missing"),
    "more entries": (content({"a": {**ONE, "stride": [1]}}), "header.a: unknown entry 'stride'"),
    "many axes": (content({"a": {**ONE, "shape": [1] * 65}}), "header.a.shape: expected a list of 0 to 64"),
    "other size": (content({"a": {**ONE, "shape": [2]}}), "'a' has 4 bytes for shape"),
    "huge and empty": (content({"a": {**ONE, "shape": [0, 2**62, 2], "data_offsets": [0, 0]}}, b""), "has 0 bytes for"),
    "backwards": (content({"a": {**ONE, "data_offsets": [4, 0]}}), "'a' has -4 bytes"),
    "gap": (content({"a": {**ONE, "data_offsets": [4, 8]}}, b"\0" * 8), "'a' begins at byte"),
    "shared": (content({"a": ONE, "b": ONE}), "'b' begins at byte"),
    "more bytes": (content({"a": ONE}, b"\0" * 5), "the tensors end at byte"),
    "fewer bytes": (content({"a": ONE}, b"\0" * 3), "the tensors end at byte"),
    "metadata of numbers": (content({"a": ONE, "__metadata__": {"n": 1}}), "header.__metadata__.n: expected text"),
    "metadata of a list": (content({"a": ONE, "__metadata__": ["n"]}), "header.__metadata__: expected an object"),
    "control signs": (content({"\x1b[2J\n": {**ONE, "dtype": "\r\n"}}), r"header\['\\x1b\[2J\\n'\].dtype: .*'\\r\\n'"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_header_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    data, words = FILES[name]
    path.write_bytes(data)
    for read in (fastmaf.load, fastmaf.load_with_extras, read_tensors):
        with pytest.raises(fastmaf.CheckpointError, match=words) as caught:
            read(path)
        assert str(path) in str(caught.value) and str(caught.value).isprintable()


def test_another_file_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "shadow"
    path.write_text("root:$6$secret:19000:0:99999:7:::\n" * 10)
    with pytest.raises(fastmaf.CheckpointError) as caught:
        fastmaf.load(path)
    assert not any(word in str(caught.value) for word in ("$6$", "secret", "19000"))


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no model file"):
        fastmaf.load(tmp_path / "a.safetensors")


def test_one_number_of_any_stride(tmp_path: Path) -> None:
    number = torch.tensor(3.0).expand(1).clone()
    assert number.stride() == (0,)
    write_tensors({"a": number, "b": number.expand(1, 1)}, tmp_path / "a.safetensors", {})
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "a.safetensors").items()} == {
        "a": [3.0], "b": [[3.0]],
    }  # fmt: skip


def test_every_dtype_as_safetensors_writes_it(tmp_path: Path) -> None:
    bits = torch.arange(64, dtype=torch.uint8)
    tensors = {
        str(dtype): bits.view(dtype).clone()
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
                      torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
                      torch.float8_e5m2)
    }  # fmt: skip
    tensors |= {"bool": torch.tensor([True, False]), "empty": torch.zeros(0, 3), "number": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "a.safetensors", {"note": "ß"})
    found, metadata = read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"note": "ß"} and found.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape
        assert torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (found[name], expected))), name


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    def write_parts(file: BinaryIO) -> None:
        for part in torch.tensor([1.0, 1.0]), torch.zeros(3):
            file.write(part.to(torch.bfloat16).view(torch.uint8).numpy().data)

    bits = torch.arange(64, dtype=torch.uint8)
    dtypes = (torch.uint8, torch.int16, torch.uint32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
              torch.float64, torch.float8_e4m3fn)  # fmt: skip
    tensors: dict[str, torch.Tensor] = {str(dtype): bits.view(dtype).clone() for dtype in dtypes}
    tensors |= {"bool": torch.tensor([True, False]), "empty": torch.zeros(0, 3), 'ü "': torch.tensor(2.5)}
    tensors |= {"strided": torch.arange(12.0)[::3], "transposed": torch.arange(6.0).view(2, 3).t(), "twice": bits[:7]}
    parts = Streamed(torch.bfloat16, 5, write_parts)
    write_tensors({**tensors, "parts": parts}, tmp_path / "a.safetensors", {"note": "ß"})
    tensors["parts"] = torch.tensor([1, 1, 0, 0, 0], dtype=torch.bfloat16)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"note": "ß"}
    for found in (load_file(tmp_path / "a.safetensors"), read_tensors(tmp_path / "a.safetensors")[0]):
        assert found.keys() == tensors.keys()
        for name, expected in tensors.items():
            assert found[name].dtype == expected.dtype and found[name].shape == expected.shape
            same = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found[name], expected))
            assert torch.equal(*same), name


def test_a_file_that_is_replaced_or_cut_while_it_is_read(tmp_path: Path) -> None:
    """The tensors belong to the header that was read, or an error says that they are gone."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(10_000)}, path)
    with TensorFile(path) as file:
        save_file({"a": torch.zeros(10_000)}, tmp_path / "b.safetensors")
        os.replace(tmp_path / "b.safetensors", path)
        assert torch.equal(file.read("a"), torch.ones(10_000))
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(fastmaf.CheckpointError, match="it ends within the tensor 'a'"):
            file.read("a")


def test_a_header_of_millions_of_values_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    """Each empty list takes 3 bytes in the file, and some 64 in memory."""
    text = b'{"a":[' + b"[]," * 4_000_000 + b"[]]}"
    (path := tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(fastmaf.CheckpointError, match=r"a.safetensors .*header: more than 4,000,000 values"):
        TensorFile(path)
