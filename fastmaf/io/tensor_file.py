"""Safetensors files: checked reading of untrusted files, and atomic writing.

A file holds the length of the header in eight bytes, the header, and the bytes of the tensors. The header is JSON: the
dtype, the shape and the byte range of each tensor, and a map of strings, the metadata.

A file is read through one open descriptor and is not memory-mapped. If it is replaced during reading, header and
tensors come from the same version; if it is truncated, reading raises an error.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastmaf.io.atomic import replace, staging, sync_file, write_errors
from fastmaf.io.safe_json import JSONError, parse, shown
from fastmaf.io.schema import ListOf, MapOf, OneOf, Record, SchemaError, Text, Whole
from fastmaf.kernels.storage import read_into

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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_MAX_NUMEL = 2**62  # zeros in a shape count as ones, since strides are 64-bit integers

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
    """The file is not a model that this version of fastmaf can load; the message gives the reason.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "flow.safetensors")
        ...     _ = path.write_bytes(b"no model")
        ...     try:
        ...         fastmaf.load(path)
        ...     except fastmaf.CheckpointError:
        ...         print("refused")
        refused
    """


class TensorInfo(NamedTuple):
    """Header entry of a tensor: dtype, shape, and the offsets of its first byte and of the byte after its last one."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file with a validated header; a context manager.

    Attributes:
        path: the path of the file.
        tensors: the header entries, by the names of the tensors.
        metadata: the strings in the header.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is not a safetensors file, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():  # checked before opening, since opening a FIFO blocks
            found = "; it is a folder" if self.path.is_dir() else ""
            raise FileNotFoundError(f"no model file at {path}{found}")
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self.tensors, self.metadata = self._header(os.fstat(self._file.fileno()).st_size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """Returns a tensor on the CPU that owns its memory.

        Raises:
            CheckpointError: the memory cannot be allocated, or the file was truncated.
        """
        dtype, shape, begin, end = self.tensors[name]
        try:
            buffer = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
        except RuntimeError:
            raise CheckpointError(f"{self.path}: no memory for the {end - begin} bytes of {shown(name)}") from None
        with self.at(name) as file:
            read_into(file, buffer)
        # Booleans with bytes other than 0 and 1 are undefined behaviour.
        return (buffer.ne(0) if dtype == torch.bool else buffer.view(dtype)).reshape(shape)

    @contextmanager
    def at(self, name: str) -> Iterator[FileIO]:
        """Yields the file at the first byte of a tensor.

        Raises:
            CheckpointError: an EOFError was raised within, as the file was truncated.
        """
        self._file.seek(self.tensors[name].begin)
        try:
            yield self._file
        except EOFError:
            raise self._damaged(f"it ends within the tensor {shown(name)}") from None

    def within(self, prefix: str) -> TensorFile:
        """Returns the part of the file whose names begin with a prefix, without it; it shares the open file.

        Tensors and strings of the metadata are those of a file that was written into this one; see
        ``fastmaf.inspection.combined``.
        """
        part = copy.copy(self)
        part.tensors = {name[len(prefix) :]: info for name, info in self.tensors.items() if name.startswith(prefix)}
        part.metadata = {key[len(prefix) :]: text for key, text in self.metadata.items() if key.startswith(prefix)}
        return part

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a safetensors file, or is damaged: {why}")

    def _header(self, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        start = self._file.read(8)
        if size < 8:
            raise self._damaged(f"it has {size} bytes, fewer than any such file")
        length = int.from_bytes(start, "little")
        if length > min(size - 8, _MAX_HEADER):
            if start.startswith(b"PK\x03\x04"):
                raise CheckpointError(
                    f"{self.path} is a zip archive, such as torch.save writes, and not a safetensors file: read a "
                    "state dict with torch.load, and give it to load_state_dict of a flow"
                )
            raise self._damaged(
                f"its header would take {length} bytes; expected at most {min(size - 8, _MAX_HEADER)} in a file of "
                f"{size}"
            )
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
    """Returns the entries of a valid header, and checks that the tensors fill the file from ``start`` to ``size``."""
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if math.prod(max(1, n) for n in shape) > _MAX_NUMEL or math.prod(shape) * dtype.itemsize != end - begin:
            raise SchemaError(f"header: {shown(name)} has {end - begin} bytes for shape {shown(shape)} of {dtype}")
        tensors[name] = TensorInfo(dtype, shape, start + begin, start + end)
    place = start
    for name, info in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if info.begin != place:
            raise SchemaError(f"header: {shown(name)} begins at byte {info.begin}; expected {place}")
        place = info.end
    if place != size:
        raise SchemaError(f"header: the tensors end at byte {place}, the file at {size}")
    return tensors


def read_tensors(path: str | os.PathLike[str], *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file by name, and its metadata.

    Args:
        path: the file.
        tensors: False reads the metadata only; the dictionary of tensors is then empty.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is not a safetensors file, or is damaged.
    """
    with TensorFile(path) as file:
        return ({name: file.read(name) for name in file.tensors} if tensors else {}), file.metadata


class Streamed(NamedTuple):
    """A 1-D tensor that is made while it is written.

    Attributes:
        dtype: of its numbers.
        numel: how many there are.
        write: a function that writes the tensor to a file, from its position on.
    """

    dtype: torch.dtype
    numel: int
    write: Callable[[BinaryIO], None]


def write_tensors(
    tensors: Mapping[str, Tensor | Streamed], path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file atomically: a temporary file is synced to disk, then moved to ``path``.

    Raises:
        OSError: the file cannot be written. The error names ``path``, and an earlier file stays intact.
    """
    target = Path(os.path.realpath(path))  # a symbolic link is kept, and its target is replaced
    with write_errors(path), staging(target.parent) as folder:
        temporary = folder / target.name
        save_file(tensors, temporary, metadata)
        sync_file(temporary)
        replace(temporary, target)


def save_file(tensors: Mapping[str, Tensor | Streamed], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; see ``write_tensors``, which replaces a file by it when it is complete."""
    # The largest numbers first, so that each tensor is aligned.
    named = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name, tensor in named:
        shape = [tensor.numel] if isinstance(tensor, Streamed) else list(tensor.shape)
        end = place + math.prod(shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in named:
            if isinstance(tensor, Streamed):
                tensor.write(file)
            else:
                flat = tensor.detach().cpu().flatten().contiguous()
                # One number is contiguous with any stride, but bytes are seen through a stride of 1 alone.
                file.write(flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data)
