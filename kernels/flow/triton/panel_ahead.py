"""The kernel of the inverse that forms products with what is finished, on all multiprocessors.

Its table is described in ``panel_items.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmaf.kernels.flow.triton import panel_items, panel_plan
from fastmaf.kernels.triton_common import device as common
from fastmaf.kernels.triton_common import few_samples, overlap

_ITEM, _LAYER = (tl.constexpr(number) for number in (panel_items.ITEM, panel_plan.LAYER))


@triton.jit
def weight_pointer(layers_ptr, layer, W_TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a layer's weight begins."""
    w_ptr = tl.load(layers_ptr + _LAYER * layer).to(tl.pointer_type(W_TYPE))
    return tl.multiple_of(w_ptr, 16) if ALIGNED else w_ptr


@triton.jit
def weight_scale(layers_ptr, layer):
    """The factor of a layer's weight."""
    return tl.load(layers_ptr + _LAYER * layer + 3).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _of_panels(numbers_ptr, j, BLOCK_J: tl.constexpr):
    """The numbers of the panels of rows j: selected, as loaded side by side they would go through shared memory."""
    numbers = tl.load(numbers_ptr) + tl.zeros([BLOCK_J], tl.int64)
    for q in tl.static_range(1, BLOCK_J // 16):
        numbers = tl.where(j // 16 == q, tl.load(numbers_ptr + q), numbers)
    return tl.max_constancy(numbers, 16)


@triton.jit
def _store_sums(sums, to_ptr, sample, n, layers_ptr, item, BLOCK_J: tl.constexpr):
    """Stores an item's sums ``[BLOCK_N, BLOCK_J]``, one row for each pointer of ``to_ptr``; the first slot's have the
    bias.
    """
    layer, j = tl.load(item), tl.arange(0, BLOCK_J)
    sums *= weight_scale(layers_ptr, layer)
    row = tl.load(item + 7) + j
    rows = tl.where(tl.load(item + 4) > 0, 0, tl.load(layers_ptr + _LAYER * layer + 2))
    bias_ptr = tl.load(layers_ptr + _LAYER * layer + 1).to(tl.pointer_type(tl.float32))
    sums += tl.load(bias_ptr + row, mask=row < rows, other=0.0)[None, :]
    tl.store(to_ptr[:, None] + j[None, :], sums, mask=(sample < n)[:, None])


@triton.jit
def _matrix_product(
    values_ptr, stride, sample, n, w_ptr, item,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, PANELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, BLOCK_J)
    base = _of_panels(item + _ITEM, j, BLOCK_J) * 16 + j % 16
    width = _of_panels(item + _ITEM + PANELS, j, BLOCK_J).to(tl.int32)
    return common.product(
        values_ptr, sample, sample < n, stride, w_ptr, base, width, 0, tl.load(item + 1).to(tl.int32),
        BLOCK_N, BLOCK_J, BLOCK_K, PRECISION,
    )  # fmt: skip


@triton.jit
def _panel_ahead_kernel(
    x_ptr, values_ptr, hidden_ptr, outputs_ptr, layers_ptr, items_ptr, n, features, stride_values, stride_hidden,
    stride_outputs,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PANELS: tl.constexpr, W_TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    LANES: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Partial sums [slots, n, stride] of a group's rows: of one panel of each hidden layer, and of its outputs."""
    tiles = tl.cdiv(n, BLOCK_N)
    item = items_ptr + tl.program_id(0) // tiles * (_ITEM + 2 * PANELS)
    first = tl.program_id(0) % tiles * BLOCK_N
    sample = first + tl.arange(0, BLOCK_N)
    from_x, of_group = tl.load(item + 3) != 0, tl.load(item + 6) != 0
    below = tl.where(from_x, x_ptr.to(tl.int64), values_ptr.to(tl.int64)).to(tl.pointer_type(tl.float32))
    below += tl.load(item + 2)
    stride = tl.where(from_x, features, stride_values)
    to = tl.where(of_group, hidden_ptr.to(tl.int64), outputs_ptr.to(tl.int64)).to(tl.pointer_type(tl.float32))
    row = tl.load(item + 4) * n + sample
    to_ptr = to + row * tl.where(of_group, stride_hidden, stride_outputs) + tl.load(item + 5)
    w_ptr = weight_pointer(layers_ptr, tl.load(item), W_TYPE, ALIGNED)
    if LANES:
        columns, place = tl.load(item + 1).to(tl.int32), tl.load(item + _ITEM)
        overlap.prefetch(w_ptr, place * 16, tl.minimum(columns, PREFETCH) * 16, OVERLAP)
    overlap.wait(OVERLAP)
    if LANES:
        # Columns beyond the finished ones have not been written.
        sums = few_samples.product(
            below, first, n, stride, w_ptr, place, 0, columns, columns, BLOCK_N, BLOCK_K, TILES, PREFETCH, OVERLAP,
        )  # fmt: skip
        _store_sums(sums, to_ptr, sample, n, layers_ptr, item, 16)
    elif of_group:  # one panel
        panel = _matrix_product(below, stride, sample, n, w_ptr, item, BLOCK_N, 16, BLOCK_K, PANELS, PRECISION)
        _store_sums(panel, to_ptr, sample, n, layers_ptr, item, 16)
    else:
        panels = _matrix_product(
            below, stride, sample, n, w_ptr, item, BLOCK_N, 16 * PANELS, BLOCK_K, PANELS, PRECISION
        )
        _store_sums(panels, to_ptr, sample, n, layers_ptr, item, 16 * PANELS)
