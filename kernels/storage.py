"""What happens to whole packed weights in memory: conversion to rows and back, clearing of padding, random numbers.

Rows are the visible weights alone, row after row: ``prefix[j]`` numbers of each row ``j``. This is the order of model
files, since it does not depend on the panels. The native library works on as many threads as torch uses, and moves
between panels and files what fits in a cache. Without it plain torch and NumPy give the same numbers, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator, Sequence
from io import FileIO
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels import native_library
from fastmaf.kernels.float8 import BYTE
from fastmaf.kernels.layout import PANEL, PackedLayout, padding

PART_BYTES = 1 << 20  # of what is converted at once without the library
_EXPONENTS = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
    BYTE: 0x7F,  # of float8_e4m3fn, NaN alone: there is no infinity
}
_BITS_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_POINTER, _INT, _BITS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
_LAYOUT = [_POINTER, _POINTER, _INT, _INT]
_FORMAT = [_INT, _BITS, _INT]
_ARGUMENTS = {
    "fastmaf_rows_to_panels": [_POINTER, _POINTER, *_LAYOUT, *_FORMAT],
    "fastmaf_panels_to_rows": [_POINTER, _POINTER, *_LAYOUT, *_FORMAT],
    "fastmaf_file_to_panels": [ctypes.c_int, _INT, _POINTER, *_LAYOUT, *_FORMAT],
    "fastmaf_panels_to_file": [ctypes.c_int, _INT, _POINTER, *_LAYOUT, *_FORMAT],
    "fastmaf_zero_padding": [_POINTER, _INT],
    "fastmaf_uniform_float": [_POINTER, *_LAYOUT, _BITS, ctypes.c_double, _INT],
    "fastmaf_uniform_double": [_POINTER, *_LAYOUT, _BITS, ctypes.c_double, _INT],
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = native_library.library()
    except ImportError:
        return None
    for name, types in _ARGUMENTS.items():
        getattr(library, name).argtypes = types
    return library


def _library_for(*weights: Tensor) -> ctypes.CDLL | None:
    """Returns the library for numbers of 2, 4 or 8 bytes."""
    return None if any(weight.dtype == BYTE for weight in weights) else _library()


def has_library() -> bool:
    """Returns whether the native library does the work."""
    return _library() is not None


def rows_to_panels(rows: Tensor, weight: Tensor, layout: PackedLayout) -> bool:
    """Writes all panels, padding included, from their rows; returns whether all numbers are finite.

    Args:
        rows: ``[layout.visible]``, contiguous, on the CPU.
        weight: the packed weight, contiguous, on the CPU; of the dtype of ``rows``.
    """
    library = _library_for(weight)
    if library is not None:
        return _is_finite(
            library.fastmaf_rows_to_panels(rows.data_ptr(), weight.data_ptr(), *_shape(layout), *_format(weight))
        )
    # All parts are converted, whatever the first ones hold.
    return all([_write_panels(rows[part.rows], weight, layout, part) for part in _parts(layout, rows.element_size())])


def panels_to_rows(weight: Tensor, rows: Tensor, layout: PackedLayout) -> bool:
    """Writes all rows from their panels: the inverse of ``rows_to_panels``, which see."""
    library = _library_for(weight)
    if library is not None:
        return _is_finite(
            library.fastmaf_panels_to_rows(weight.data_ptr(), rows.data_ptr(), *_shape(layout), *_format(weight))
        )
    return all([_write_rows(weight, rows[part.rows], layout, part) for part in _parts(layout, rows.element_size())])


def read_rows(file: FileIO, weight: Tensor, layout: PackedLayout) -> bool:
    """Fills a packed weight with the rows that a file has from its position on, perhaps not all of it where a number is
    not finite; returns whether all are.

    Args:
        file: an open file.
        weight: contiguous, on the CPU.

    Raises:
        EOFError: the file ends before.
        OSError: it cannot be read.
    """
    library = _library_for(weight)
    if library is not None:
        where = file.fileno(), file.tell(), weight.data_ptr()
        return _is_finite(library.fastmaf_file_to_panels(*where, *_shape(layout), *_format(weight)))
    finite = True
    for part, rows in _buffered_parts(layout, weight.dtype):
        read_into(file, rows)
        finite &= _write_panels(rows, weight, layout, part)
    return finite


def read_into(file: FileIO, target: Tensor) -> None:
    """Fills a contiguous tensor of the CPU with the numbers that a file has from its position on.

    Raises:
        EOFError: the file ends before.
    """
    buffer = target.view(torch.uint8).numpy().data
    while len(buffer):
        count = file.readinto(buffer)
        if not count:
            raise EOFError
        buffer = buffer[count:]


def write_rows(file: BinaryIO, weight: Tensor, layout: PackedLayout) -> bool:
    """Writes the rows of a packed weight to a file, from its position on, up to the first number that is not finite;
    returns whether there is none.

    Args:
        file: an open file.
        weight: contiguous, on the CPU.

    Raises:
        OSError: it cannot be written.
    """
    library = _library_for(weight)
    if library is not None:
        file.flush()
        where = file.fileno(), file.tell(), weight.data_ptr()
        finite = _is_finite(library.fastmaf_panels_to_file(*where, *_shape(layout), *_format(weight)))
        file.seek(layout.visible * weight.element_size(), os.SEEK_CUR)
        return finite
    for part, rows in _buffered_parts(layout, weight.dtype):
        if not _write_rows(weight, rows, layout, part):
            return False
        file.write(rows.view(torch.uint8).numpy().data)
    return True


def _shape(layout: PackedLayout) -> tuple[int, ...]:
    return layout.prefix.data_ptr(), layout.panels.data_ptr(), layout.out_features, len(layout.panels) - 1


def _format(weight: Tensor) -> tuple[int, ...]:
    return weight.element_size(), _EXPONENTS[weight.dtype], torch.get_num_threads()


def _is_finite(status: int) -> bool:
    if status < 0:
        raise OSError(-status, os.strerror(-status))
    if status == 2:
        raise EOFError
    return status == 0


class _Part(NamedTuple):
    """Panels ``start..end`` of a layer, and their rows among the numbers of all rows."""

    start: int
    end: int
    rows: slice

    @property
    def numel(self) -> int:
        return int(self.rows.stop - self.rows.start)


def _parts(layout: PackedLayout, itemsize: int) -> list[_Part]:
    """Returns parts of about ``PART_BYTES`` that cover all panels; none is smaller than a panel."""
    last_rows = (PANEL * torch.arange(1, len(layout.panels), device="cpu")).clamp_(max=layout.out_features) - 1
    ends: list[int] = layout.prefix.cumsum(0)[last_rows].tolist()
    result, start, first = [], 0, 0
    for panel, numbers in enumerate(ends):
        if (numbers - first) * itemsize >= PART_BYTES or panel == len(ends) - 1:
            result.append(_Part(start, panel + 1, slice(first, numbers)))
            start, first = panel + 1, numbers
    return result


def _buffered_parts(layout: PackedLayout, dtype: torch.dtype) -> Iterator[tuple[_Part, Tensor]]:
    """Yields the parts with memory for their rows, the same for all: fresh memory takes longer than the conversion."""
    parts = _parts(layout, dtype.itemsize)
    buffer = torch.empty(max(part.numel for part in parts), dtype=dtype, device="cpu")
    for part in parts:
        yield part, buffer[: part.numel]


def _write_panels(rows: Tensor, weight: Tensor, layout: PackedLayout, part: _Part) -> bool:
    for dense, visible, panels, numbers in _dense(rows, weight, layout, part):
        dense[:] = 0
        dense.reshape(-1, dense.shape[2])[: len(visible)][visible] = numbers
        panels[:] = dense.swapaxes(1, 2)
    return _finite(rows)


def _write_rows(weight: Tensor, rows: Tensor, layout: PackedLayout, part: _Part) -> bool:
    for dense, visible, panels, numbers in _dense(rows, weight, layout, part):
        dense[:] = panels.swapaxes(1, 2)
        numbers[:] = dense.reshape(-1, dense.shape[2])[: len(visible)][visible]
    return _finite(rows)


def _dense(rows: Tensor, weight: Tensor, layout: PackedLayout, part: _Part) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Yields an empty ``[panels, 16, width]``, the mask ``[rows, width]`` of its rows, the panels, and their rows.

    They are bits in arrays of NumPy, whose operations run on this thread: torch would share out the little work of
    each, and wait for its threads thousands of times.
    """
    bits, rows, first = _BITS_OF[rows.element_size()], rows.detach(), 0
    weight = weight.detach().view(bits)
    for run in layout.runs:
        start, end = max(run.start, part.start), min(run.end, part.end)
        if start < end and run.width:
            sees = layout.prefix[PANEL * start : PANEL * end].numpy()
            visible = torch.arange(run.width, device="cpu").numpy() < sees[:, None]
            numel = int(sees.sum())
            dense = torch.empty(end - start, PANEL, run.width, dtype=bits, device="cpu").numpy()
            panels = run.of(weight)[start - run.start : end - run.start].numpy()
            yield dense, visible, panels, rows[first : first + numel].view(bits).numpy()
            first += numel


def _finite(rows: Tensor) -> bool:
    exponent = _EXPONENTS[rows.dtype]
    return bool((rows.detach().view(_BITS_OF[rows.element_size()]).numpy() & exponent != exponent).all())


def to_rows(weight: Tensor, layout: PackedLayout) -> Tensor:
    """Returns the visible weights of a packed weight on the CPU, row after row."""
    weight = weight.detach().contiguous()
    rows = weight.new_empty(layout.visible)
    panels_to_rows(weight, rows, layout)
    return rows


def from_rows(rows: Tensor, layout: PackedLayout) -> Tensor:
    """Returns the packed weight for visible weights on the CPU, row after row.

    Raises:
        ValueError: the dtype is not one of packed weights.
    """
    if rows.dtype not in _EXPONENTS:
        raise ValueError(f"packed weights must be of one of {', '.join(map(str, _EXPONENTS))}; found {rows.dtype}")
    weight = rows.new_empty(layout.numel)
    rows_to_panels(rows.detach().contiguous(), weight, layout)
    return weight


def zero_padding(weights: Sequence[Tensor], prefixes: Sequence[Tensor], panels: Sequence[Tensor]) -> bool:
    """Writes zero to the padding of packed weights wherever it is not zero, in place, and returns whether any was not.

    Neither autograd nor a version counter sees it.

    Args:
        weights: contiguous, on the CPU.
        prefixes: of each weight, int64, on the CPU.
        panels: ``PackedLayout.panels`` of each.
    """
    if _library_for(*weights) is not None:
        return Paddings(weights, prefixes, panels).zero()
    changed = False
    for weight, prefix, columns in zip(weights, prefixes, panels, strict=True):
        with torch.inference_mode():
            where = padding(prefix, columns)
            if weight.detach()[where].count_nonzero():
                weight.data.index_fill_(0, where, 0)
                changed = True
    return changed


class Paddings:
    """The padding of some weights, as the native library finds it while all tensors stay in the same memory.

    Args:
        weights, prefixes, panels: as of ``zero_padding``.
    """

    def __init__(self, weights: Sequence[Tensor], prefixes: Sequence[Tensor], panels: Sequence[Tensor]) -> None:
        numbers: list[int] = []  # of the structs ``PaddedWeight`` of csrc/storage.cpp
        for weight, prefix, columns in zip(weights, prefixes, panels, strict=True):
            numbers += weight.data_ptr(), prefix.data_ptr(), columns.data_ptr()
            numbers += prefix.shape[0], columns.shape[0] - 1, weight.element_size()
        self._structs, self._count = (_INT * len(numbers))(*numbers), len(weights)

    def zero(self) -> bool:
        """Does what ``zero_padding`` does; needs the native library."""
        library = _library()
        assert library is not None
        return bool(library.fastmaf_zero_padding(self._structs, self._count))


def uniform_(weight: Tensor, layout: PackedLayout, bound: float, generator: torch.Generator | None = None) -> None:
    """Fills a packed weight with numbers uniform in ``[-bound, bound)``, and its padding with zeros.

    On the CPU one number is drawn from the generator, as a seed, and each weight depends on it, its row and its column
    alone. Weights of fewer bits are those of float64, rounded down to multiples of ``bound / 2**23``.
    """
    with torch.no_grad():
        if weight.device.type != "cpu" or type(weight.detach()) is not Tensor or not weight.is_contiguous():
            layout.zero_padding_(weight.uniform_(-bound, bound, generator=generator))
            return
        seed = int(torch.randint(-(2**63), 2**63 - 1, (), generator=generator, device="cpu"))
        _write_uniform(weight.detach(), layout, bound, seed)
        weight.narrow(0, 0, 0).zero_()  # increments its version


def _write_uniform(weight: Tensor, layout: PackedLayout, bound: float, seed: int) -> None:
    dtype, library = weight.dtype if weight.dtype == torch.float64 else torch.float32, _library()
    if library is None:
        for part in _parts(layout, dtype.itemsize):
            rows = _uniform_rows(part, dtype, seed, bound)
            _write_panels(rows.to(weight.dtype), weight, layout, part)
        return
    target = weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
    fill = library.fastmaf_uniform_double if dtype == torch.float64 else library.fastmaf_uniform_float
    _is_finite(fill(target.data_ptr(), *_shape(layout), seed, bound, torch.get_num_threads()))
    if target is not weight:
        weight.copy_(target)


def _uniform_rows(part: _Part, dtype: torch.dtype, seed: int, bound: float) -> Tensor:
    """Returns the rows of a part; see ``csrc/uniform.cpp``."""
    bits = 53 if dtype == torch.float64 else 24
    # Arrays of int64, which wrap around as uint64 does; see ``_dense``.
    z: Any = torch.empty(part.numel, dtype=torch.int64, device="cpu").numpy()
    z[:] = 1
    z.cumsum(out=z)
    z += part.rows.start  # the index, and one
    z *= _signed(0x9E3779B97F4A7C15)
    z += _signed(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z ^= _shifted(z, shift)
        z *= _signed(factor)
    numbers = torch.empty(part.numel, dtype=dtype, device="cpu")
    values: Any = numbers.numpy()
    values[:] = _shifted(z, 64 - bits) - 2 ** (bits - 1)
    values *= bound / 2 ** (bits - 1)
    return numbers


def _signed(bits: int) -> int:
    return (bits + 2**63) % 2**64 - 2**63


def _shifted(z: Any, shift: int) -> Any:
    """Returns ``z >> shift`` of unsigned numbers."""
    return (z >> shift) & (2 ** (64 - shift) - 1)
