"""Reading safetensors files that may come from anywhere.

A file is eight bytes with the length of a header, the header, and the tensors' bytes. The header is JSON: for each
tensor its dtype, its shape and where its bytes begin and end, and a map of strings for whatever else there is to say.

All of it is read through one open file. A file that is replaced meanwhile gives the header and the tensors of one
version, and, as nothing is mapped into memory, one that is cut short meanwhile gives an error.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaf.io.safe_json import JSONError, parse, shown
from fastmaf.io.schema import ListOf, MapOf, OneOf, Record, SchemaError, Text, Whole

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_MAX_NUMEL = 2**62  # of a shape with its zeros taken for ones: strides are 64-bit integers

_SIZE = Whole(0, 2**62)
_TENSOR = Record(
    {
        "dtype": OneOf(tuple(_DTYPES)),
        "shape": ListOf(_SIZE, longest=64),
        "data_offsets": ListOf(_SIZE, shortest=2, longest=2),
    }
)
_TENSORS, _METADATA = MapOf(_TENSOR), MapOf(Text(_MAX_HEADER))


class CheckpointError(ValueError):
    """The file is not a model that this version of fastmaf can load; the message says why."""


class TensorInfo(NamedTuple):
    """What a header says of a tensor: its dtype, its shape, and where its bytes begin and end in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file whose header has been read and checked; a context manager.

    Attributes:
        path: of the file.
        tensors: by name.
        metadata: the strings of the header.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a safetensors file, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():  # asked before opening, as a FIFO would block
            raise FileNotFoundError(f"no model file at {path}")
        self._file = open(path, "rb")  # noqa: SIM115
        try:
            size = os.fstat(self._file.fileno()).st_size
            self.tensors, self.metadata = self._header(size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """Returns a tensor, on the CPU, in memory of its own.

        Raises:
            CheckpointError: it cannot be allocated, or the file has become shorter.
        """
        dtype, shape, begin, end = self.tensors[name]
        try:
            buffer = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
        except RuntimeError:
            raise CheckpointError(f"{self.path}: no memory for the {end - begin} bytes of {shown(name)}") from None
        self._file.seek(begin)
        if self._file.readinto(buffer.numpy().data) != end - begin:
            raise self._damaged(f"it ends within the tensor {shown(name)}")
        # A byte of a boolean other than 0 and 1 would be undefined behaviour.
        return (buffer.ne(0) if dtype == torch.bool else buffer.view(dtype)).reshape(shape)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a safetensors file, or is damaged: {why}")

    def _header(self, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise self._damaged(f"expected a header of at most {min(max(size - 8, 0), _MAX_HEADER)} bytes")
        try:
            header = parse(self._file.read(length).decode("utf-8"), "header")
            metadata: dict[str, str] = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
            _METADATA.check(metadata, "header.__metadata__")
            _TENSORS.check(header, "header")
            return _tensors(header, 8 + length, size), metadata
        except UnicodeDecodeError:
            raise self._damaged("its header is not UTF-8 text") from None
        except (JSONError, SchemaError) as error:
            raise self._damaged(str(error)) from None


def _tensors(header: dict[str, Any], start: int, size: int) -> dict[str, TensorInfo]:
    """Returns the tensors of a checked header, each of whose bytes belong to one tensor; ``start`` is that of all."""
    found: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if math.prod(max(1, n) for n in shape) > _MAX_NUMEL or math.prod(shape) * dtype.itemsize != end - begin:
            raise SchemaError(f"header: {shown(name)} has {end - begin} bytes for shape {shown(shape)} of {dtype}")
        found[name] = TensorInfo(dtype, shape, start + begin, start + end)
    place = start
    for name, info in sorted(found.items(), key=lambda item: item[1][2:]):
        if info.begin != place:
            raise SchemaError(f"header: {shown(name)} begins at byte {info.begin}; expected {place}")
        place = info.end
    if place != size:
        raise SchemaError(f"header: the tensors end at byte {place}, the file at {size}")
    return found
