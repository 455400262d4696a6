"""What happens to whole packed weights in memory: conversion to rows and back, clearing of padding, random numbers.

Rows are the visible weights alone, row after row: ``prefix[j]`` numbers of each row ``j``. This is the order of model
files, since it does not depend on the panels. The native library works on as many threads as torch uses, and moves
between panels and files what fits in a cache. Without it ``storage_numpy.py`` does the work.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from io import FileIO
from typing import BinaryIO

import torch
from torch import Tensor

from fastmaf.kernels import native_library
from fastmaf.kernels.float8 import BYTE
from fastmaf.kernels.layout import PANEL, PackedLayout, padding
from fastmaf.kernels.native_checks import check_layout, check_tensor
from fastmaf.kernels.storage_numpy import EXPONENTS, buffered_parts, fill_panels, fill_rows, parts, uniform_rows

if sys.platform == "win32":
    import msvcrt

_POINTER, _INT, _BITS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
_LAYOUT = [_POINTER, _POINTER, _INT, _INT]
_FORMAT = [_INT, _BITS, _INT]
_ARGUMENTS = {
    "fastmaf_rows_to_panels": [_POINTER, _POINTER, *_LAYOUT, *_FORMAT],
    "fastmaf_panels_to_rows": [_POINTER, _POINTER, *_LAYOUT, *_FORMAT],
    "fastmaf_file_to_panels": [_INT, _INT, _POINTER, *_LAYOUT, *_FORMAT],
    "fastmaf_panels_to_file": [_INT, _INT, _POINTER, *_LAYOUT, *_FORMAT],
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
        where = _of_rows(rows, weight, layout), *_of_panels(weight, layout)
        return _is_finite(library.fastmaf_rows_to_panels(*where, *_format(weight)))
    # All parts are converted, whatever the first ones hold.
    return all([fill_panels(rows[part.rows], weight, layout, part) for part in parts(layout, rows.element_size())])


def panels_to_rows(weight: Tensor, rows: Tensor, layout: PackedLayout) -> bool:
    """Writes all rows from their panels: the inverse of ``rows_to_panels``, which see."""
    library = _library_for(weight)
    if library is not None:
        address, *of = _of_panels(weight, layout)
        return _is_finite(
            library.fastmaf_panels_to_rows(address, _of_rows(rows, weight, layout), *of, *_format(weight))
        )
    return all([fill_rows(weight, rows[part.rows], layout, part) for part in parts(layout, rows.element_size())])


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
        where = _handle(file), file.tell(), *_of_panels(weight, layout)
        return _is_finite(library.fastmaf_file_to_panels(*where, *_format(weight)))
    finite = True
    for part, rows in buffered_parts(layout, weight.dtype):
        read_into(file, rows)
        finite &= fill_panels(rows, weight, layout, part)
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
        begin = file.tell()
        where = _handle(file), begin, *_of_panels(weight, layout)
        finite = _is_finite(library.fastmaf_panels_to_file(*where, *_format(weight)))
        file.seek(begin + layout.visible * weight.element_size())  # from where it was: Windows moves it with each part
        return finite
    for part, rows in buffered_parts(layout, weight.dtype):
        if not fill_rows(weight, rows, layout, part):
            return False
        file.write(rows.view(torch.uint8).numpy().data)
    return True


def _handle(file: BinaryIO | FileIO) -> int:
    """Returns what the system calls an open file: a descriptor, or a HANDLE of Windows."""
    if sys.platform == "win32":
        return msvcrt.get_osfhandle(file.fileno())
    return file.fileno()


def _of_rows(rows: Tensor, weight: Tensor, layout: PackedLayout) -> int:
    check_tensor("rows", rows, weight.dtype, (layout.visible,))
    return rows.data_ptr()


def _of_panels(weight: Tensor, layout: PackedLayout) -> tuple[int, ...]:
    """Returns a weight and its layout as the library receives them; ValueError: they do not fit one another."""
    _check_weight(weight, layout.panels)
    prefix, panels = layout.prefix, layout.panels
    return weight.data_ptr(), prefix.data_ptr(), panels.data_ptr(), layout.out_features, len(panels) - 1


def _check_weight(weight: Tensor, panels: Tensor) -> None:
    _check_dtype(weight.dtype)
    check_tensor("weight", weight, weight.dtype, (PANEL * int(panels[-1]),))


def _check_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError unless packed weights may be of a dtype: a floating-point one of 16 bits or more."""
    if dtype not in EXPONENTS:
        raise ValueError(f"packed weights must be of one of {', '.join(map(str, EXPONENTS))}; found {dtype}")


def _format(weight: Tensor) -> tuple[int, ...]:
    return weight.element_size(), EXPONENTS[weight.dtype], torch.get_num_threads()


def _is_finite(status: int) -> bool:
    if status < 0:
        raise OSError(-status, os.strerror(-status))
    if status == 2:
        raise EOFError
    return status == 0


def from_rows(rows: Tensor, layout: PackedLayout) -> Tensor:
    """Returns the packed weight for visible weights on the CPU, row after row.

    Raises:
        ValueError: the dtype is not one of packed weights.
    """
    _check_dtype(rows.dtype)
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

    Raises:
        ValueError: a weight does not fit its prefix and panels. It is cleared before an op looks at its arguments.
    """

    def __init__(self, weights: Sequence[Tensor], prefixes: Sequence[Tensor], panels: Sequence[Tensor]) -> None:
        numbers: list[int] = []  # of the structs ``PaddedWeight`` of csrc/storage.cpp
        for weight, prefix, columns in zip(weights, prefixes, panels, strict=True):
            check_layout(prefix, columns)
            _check_weight(weight, columns)
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
        for part in parts(layout, dtype.itemsize):
            rows = uniform_rows(part, dtype, seed, bound)
            fill_panels(rows.to(weight.dtype), weight, layout, part)
        return
    target = weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
    fill = library.fastmaf_uniform_double if dtype == torch.float64 else library.fastmaf_uniform_float
    _is_finite(fill(*_of_panels(target, layout), seed, bound, torch.get_num_threads()))
    if target is not weight:
        weight.copy_(target)
