"""What ``storage.py`` does where there is no native library, in NumPy and torch: the same numbers, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.layout import PANEL, PackedLayout

PART_BYTES = 1 << 20  # of what is converted at once without the library
EXPONENTS = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
_BITS_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Part(NamedTuple):
    """Panels ``start..end`` of a layer, and their rows among the numbers of all rows."""

    start: int
    end: int
    rows: slice

    @property
    def numel(self) -> int:
        return int(self.rows.stop - self.rows.start)


def parts(layout: PackedLayout, itemsize: int) -> list[Part]:
    """Returns parts of about ``PART_BYTES`` that cover all panels; none is smaller than a panel."""
    last_rows = (PANEL * torch.arange(1, len(layout.panels), device="cpu")).clamp_(max=layout.out_features) - 1
    ends: list[int] = layout.prefix.cumsum(0)[last_rows].tolist()
    result, start, first = [], 0, 0
    for panel, numbers in enumerate(ends):
        if (numbers - first) * itemsize >= PART_BYTES or panel == len(ends) - 1:
            result.append(Part(start, panel + 1, slice(first, numbers)))
            start, first = panel + 1, numbers
    return result


def buffered_parts(layout: PackedLayout, dtype: torch.dtype) -> Iterator[tuple[Part, Tensor]]:
    """Yields the parts with memory for their rows, the same for all: fresh memory takes longer than the conversion."""
    all_parts = parts(layout, dtype.itemsize)
    buffer = torch.empty(max(part.numel for part in all_parts), dtype=dtype, device="cpu")
    for part in all_parts:
        yield part, buffer[: part.numel]


def fill_panels(rows: Tensor, weight: Tensor, layout: PackedLayout, part: Part) -> bool:
    """Writes the panels of a part from its rows; returns whether all numbers are finite."""
    for dense, visible, panels, numbers in _dense(rows, weight, layout, part):
        dense[:] = 0
        dense.reshape(-1, dense.shape[2])[: len(visible)][visible] = numbers
        panels[:] = dense.swapaxes(1, 2)
    return _finite(rows)


def fill_rows(weight: Tensor, rows: Tensor, layout: PackedLayout, part: Part) -> bool:
    """Writes the rows of a part from its panels; returns whether all numbers are finite."""
    for dense, visible, panels, numbers in _dense(rows, weight, layout, part):
        dense[:] = panels.swapaxes(1, 2)
        numbers[:] = dense.reshape(-1, dense.shape[2])[: len(visible)][visible]
    return _finite(rows)


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
    exponent = EXPONENTS[rows.dtype]
    return bool((rows.detach().view(_BITS_OF[rows.element_size()]).numpy() & exponent != exponent).all())


def uniform_rows(part: Part, dtype: torch.dtype, seed: int, bound: float) -> Tensor:
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
