"""What happens to whole packed weights in memory: conversion to rows and back, clearing of padding, random numbers.

Rows are the visible weights alone, row after row: ``prefix[j]`` numbers of each row ``j``. This is the order of model
files, since it does not depend on the panels. Work is done in parts of about a megabyte, on as many threads as torch
uses; the functions of the native library release the interpreter's lock. Without the library plain torch gives the same
numbers, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels import native_library
from fastmaf.kernels.layout import PANEL, PackedLayout, padding

PART_BYTES = 1 << 20  # a part and its panels stay in a second-level cache
_EXPONENTS = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
_BITS_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_POINTER, _INT, _BITS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
_ARGUMENTS = {
    "fastmaf_rows_to_panels": [*[_POINTER] * 4, *[_INT] * 4, _BITS],
    "fastmaf_panels_to_rows": [*[_POINTER] * 4, *[_INT] * 4, _BITS],
    "fastmaf_zero_padding": [_POINTER, _INT],
    "fastmaf_uniform_float": [_POINTER, _INT, _BITS, _BITS, ctypes.c_double],
    "fastmaf_uniform_double": [_POINTER, _INT, _BITS, _BITS, ctypes.c_double],
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


def has_library() -> bool:
    """Returns whether the native library does the work."""
    return _library() is not None


class Part(NamedTuple):
    """Panels ``start..end`` of a layer; their rows are ``numel`` numbers, from ``first`` on of those of all rows."""

    start: int
    end: int
    first: int
    numel: int


def parts(layout: PackedLayout, itemsize: int) -> list[Part]:
    """Returns parts of about ``PART_BYTES`` that cover all panels; none is smaller than a panel."""
    last_rows = (PANEL * torch.arange(1, len(layout.panels), device="cpu")).clamp_(max=layout.out_features) - 1
    ends: list[int] = layout.prefix.cumsum(0)[last_rows].tolist()
    result, start, first = [], 0, 0
    for panel, numbers in enumerate(ends):
        if (numbers - first) * itemsize >= PART_BYTES or panel == len(ends) - 1:
            result.append(Part(start, panel + 1, first, numbers - first))
            start, first = panel + 1, numbers
    return result


def in_threads(work: Callable[[Iterator[Part]], None], items: Sequence[Part]) -> None:
    """Calls ``work`` on several threads with the items that no other thread has taken; an error of one ends all."""
    count = min(torch.get_num_threads(), len(items)) if _library() else 1  # torch's own operations use threads anyway
    remaining = deque(items)

    def taken() -> Iterator[Part]:
        while True:
            try:
                yield remaining.popleft()
            except IndexError:
                return

    def run() -> None:
        try:
            work(taken())
        except BaseException:
            remaining.clear()
            raise

    if count <= 1:
        return run()
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(run) for _ in range(count)]:
            future.result()


def rows_to_panels(rows: Tensor, weight: Tensor, layout: PackedLayout, part: Part) -> bool:
    """Writes the panels of a part, padding included, from its rows; returns whether all numbers are finite.

    Args:
        rows: ``[part.numel]``, contiguous, on the CPU.
        weight: the packed weight, contiguous, on the CPU; of the dtype of ``rows``.
    """
    library = _library()
    if library is not None:
        return bool(
            library.fastmaf_rows_to_panels(rows.data_ptr(), weight.data_ptr(), *_described(weight, layout, part))
        )
    for dense, visible, panels, numbers in _dense(rows, weight, layout, part):
        dense[:] = 0
        dense.reshape(-1, dense.shape[2])[: len(visible)][visible] = numbers
        panels[:] = dense.swapaxes(1, 2)
    return _finite(rows)


def panels_to_rows(weight: Tensor, rows: Tensor, layout: PackedLayout, part: Part) -> bool:
    """Writes the rows of a part from its panels: the inverse of ``rows_to_panels``, which see."""
    library = _library()
    if library is not None:
        return bool(
            library.fastmaf_panels_to_rows(weight.data_ptr(), rows.data_ptr(), *_described(weight, layout, part))
        )
    for dense, visible, panels, numbers in _dense(rows, weight, layout, part):
        dense[:] = panels.swapaxes(1, 2)
        numbers[:] = dense.reshape(-1, dense.shape[2])[: len(visible)][visible]
    return _finite(rows)


def _described(weight: Tensor, layout: PackedLayout, part: Part) -> tuple[int, ...]:
    prefix, panels = layout.prefix.data_ptr(), layout.panels.data_ptr()
    return prefix, panels, layout.out_features, part.start, part.end, weight.element_size(), _EXPONENTS[weight.dtype]


def _dense(rows: Tensor, weight: Tensor, layout: PackedLayout, part: Part) -> Iterator[tuple[Any, Any, Any, Any]]:
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
    for part in parts(layout, weight.element_size()):
        panels_to_rows(weight, rows[part.first : part.first + part.numel], layout, part)
    return rows


def from_rows(rows: Tensor, layout: PackedLayout) -> Tensor:
    """Returns the packed weight for visible weights on the CPU, row after row.

    Raises:
        ValueError: the dtype is not a floating-point one of 16 bits or more.
    """
    if rows.dtype not in _EXPONENTS:
        raise ValueError(f"packed weights must be of one of {', '.join(map(str, _EXPONENTS))}; found {rows.dtype}")
    rows = rows.detach().contiguous()
    weight = rows.new_empty(layout.numel)
    for part in parts(layout, weight.element_size()):
        rows_to_panels(rows[part.first : part.first + part.numel], weight, layout, part)
    return weight


def zero_padding(weights: Sequence[Tensor], prefixes: Sequence[Tensor], panels: Sequence[Tensor]) -> bool:
    """Writes zero to the padding of packed weights wherever it is not zero, in place, and returns whether any was not.

    Neither autograd nor a version counter sees it.

    Args:
        weights: contiguous, on the CPU.
        prefixes: of each weight, int64, on the CPU.
        panels: ``PackedLayout.panels`` of each.
    """
    if has_library():
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
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    todo = parts(layout, dtype.itemsize)

    def work(items: Iterator[Part]) -> None:
        buffer = torch.empty(max(part.numel for part in todo), dtype=dtype, device="cpu")
        for part in items:
            rows = buffer[: part.numel]
            _fill_uniform(rows, seed, part.first, bound)
            rows_to_panels(rows.to(weight.dtype), weight, layout, part)

    in_threads(work, todo)


def _fill_uniform(numbers: Tensor, seed: int, first: int, bound: float) -> None:
    """Writes the numbers of index ``first`` on; see ``csrc/uniform.cpp``."""
    library, double = _library(), numbers.dtype == torch.float64
    if library is not None:
        fill = library.fastmaf_uniform_double if double else library.fastmaf_uniform_float
        fill(numbers.data_ptr(), numbers.numel(), seed, first, bound)
        return
    bits = 53 if double else 24
    # Arrays of int64, which wrap around as uint64 does; see ``_dense``.
    z: Any = torch.empty(numbers.numel(), dtype=torch.int64, device="cpu").numpy()
    z[:] = 1
    z.cumsum(out=z)
    z += first  # the index, and one
    z *= _signed(0x9E3779B97F4A7C15)
    z += _signed(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z ^= _shifted(z, shift)
        z *= _signed(factor)
    values: Any = numbers.numpy()
    values[:] = _shifted(z, 64 - bits) - 2 ** (bits - 1)
    values *= bound / 2 ** (bits - 1)


def _signed(bits: int) -> int:
    return (bits + 2**63) % 2**64 - 2**63


def _shifted(z: Any, shift: int) -> Any:
    """Returns ``z >> shift`` of unsigned numbers."""
    return (z >> shift) & (2 ** (64 - shift) - 1)
