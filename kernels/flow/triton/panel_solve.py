"""The kernels of the inverse that finish a group: its own steps, and the units of a wide one.

Kernel boundaries are the only synchronisation between programs. The tables are described in ``panel_plan.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmaf.kernels.affine_output import triton_map
from fastmaf.kernels.flow.triton import panel_plan
from fastmaf.kernels.flow.triton.panel_ahead import weight_pointer, weight_scale
from fastmaf.kernels.triton_common import device as common
from fastmaf.kernels.triton_common import overlap

_GROUP, _GROUP_LAYER, _CHUNK = (
    tl.constexpr(number) for number in (panel_plan.GROUP, panel_plan.GROUP_LAYER, panel_plan.CHUNK)
)


@triton.jit
def _chunk_numbers(chunk, BLOCK_D: tl.constexpr, LAYERS: tl.constexpr):
    """A chunk's row of the table: first dimension, first and end that it finishes; first and end unit of each layer;
    places and widths of its outputs' panels.
    """
    units, places, widths = (), (), ()
    for k in tl.static_range(2 * LAYERS):
        units = units + (tl.load(chunk + _CHUNK + k).to(tl.int32),)
    for q in tl.static_range(BLOCK_D // 8):
        places = places + (tl.load(chunk + _CHUNK + 2 * LAYERS + q),)
        widths = widths + (tl.load(chunk + _CHUNK + 2 * LAYERS + BLOCK_D // 8 + q).to(tl.int32),)
    dims = tl.load(chunk).to(tl.int32), tl.load(chunk + 1).to(tl.int32), tl.load(chunk + 2).to(tl.int32)
    return dims, units, places, widths


@triton.jit
def _of_rows(numbers, r, BLOCK_R: tl.constexpr):
    """The number of each row's panel, selected as in ``panel_ahead._of_panels``."""
    result = numbers[0] + tl.zeros_like(r).to(numbers[0].dtype)
    for q in tl.static_range(1, BLOCK_R // 16):
        result = tl.where(r // 16 == q, numbers[q], result)
    return tl.max_constancy(result, 16)


@triton.jit
def _chunk(
    z_ptr, outputs_ptr, w_ptr, w_first_ptr, width_first, dims, places, widths, sample, n, features, first_row, slots,
    stride_outputs,
    BLOCK_D: tl.constexpr, OUTPUT_SLOTS: tl.constexpr,
):  # fmt: skip
    """What a chunk of a step reads, none of which depends on the steps before: z, the sums of its outputs ahead, their
    weights for the group's own units, and those of the first layer's panel for its x.
    """
    start = tl.multiple_of(dims[0], 8)
    d, r, c, lane = start + tl.arange(0, BLOCK_D), tl.arange(0, 2 * BLOCK_D), tl.arange(0, 16), tl.arange(0, 16)
    # Rows of other dimensions are loaded and computed with the rest: a mask that cuts panels would make narrow loads.
    d_ok = (d >= dims[1]) & (d < dims[2])
    base, width = _of_rows(places, r, 2 * BLOCK_D) * 16 + r % 16, _of_rows(widths, r, 2 * BLOCK_D)
    w = tl.load(
        w_ptr + base[None, None, :] + (c * 16)[None, :, None],
        mask=c[None, :, None] < width[None, None, :],
        other=0,
    )
    w_first = tl.load(
        w_first_ptr + (d.to(tl.int64) * 16)[None, :, None] + lane[None, None, :],
        mask=(d_ok & (d < width_first))[None, :, None],
        other=0,
    )
    slot = tl.arange(0, OUTPUT_SLOTS).to(tl.int64)
    row = slot[None, :, None] * n + sample[:, None, None]
    sums = tl.load(
        outputs_ptr + row * stride_outputs + (2 * start - first_row + r)[None, None, :],
        mask=(sample < n)[:, None, None] & (slot < slots)[None, :, None],
        other=0.0,
    )
    z = tl.load(z_ptr + sample[:, None] * features + d[None, :], mask=(sample < n)[:, None] & d_ok[None, :], other=0.0)
    return z, tl.sum(sums, 1), w, w_first


@triton.jit
def _panel_solve_kernel(
    z_ptr, x_ptr, values_ptr, ladj_ptr, hidden_ptr, outputs_ptr, layers_ptr, group_ptr, chunks_ptr, limit, epsilon, n,
    features, stride_values, stride_outputs,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LAYERS: tl.constexpr, SLOTS: tl.constexpr,
    OUTPUT_SLOTS: tl.constexpr, W_TYPE: tl.constexpr, ALIGNED: tl.constexpr, RELU: tl.constexpr,
    SHIFT_FIRST: tl.constexpr, KIND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A group's steps for a tile of samples: x, the group's units of each layer, and what it adds to ladj, float64.

    The sums and the finished units of each hidden layer's panel stay in registers, and a chunk's weights are loaded
    while the one before is computed.
    """
    STRIDE: tl.constexpr = _CHUNK + 2 * LAYERS + BLOCK_D // 4
    sample = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 16)
    first_chunk, end_chunk = tl.load(group_ptr).to(tl.int32), tl.load(group_ptr + 1).to(tl.int32)
    first_row, slots = tl.load(group_ptr + 2).to(tl.int32), tl.load(group_ptr + 3).to(tl.int32)
    w_ptr = weight_pointer(layers_ptr, LAYERS, W_TYPE, ALIGNED)
    first_layer = group_ptr + _GROUP
    w_first_ptr = weight_pointer(layers_ptr, 0, W_TYPE, ALIGNED) + tl.load(first_layer) * 16
    width_first = tl.load(first_layer + 1).to(tl.int32)
    # Two chunks ahead of the one that is computed its numbers are loaded, one ahead what lies where these say.
    dims, own_units, places, widths = _chunk_numbers(chunks_ptr + first_chunk * STRIDE, BLOCK_D, LAYERS)
    next_dims, next_own_units, next_places, next_widths = _chunk_numbers(
        chunks_ptr + tl.minimum(first_chunk + 1, end_chunk - 1) * STRIDE, BLOCK_D, LAYERS
    )
    overlap.wait(OVERLAP)
    sums, units, weights = (), (), ()
    for k in tl.static_range(LAYERS):
        layer = group_ptr + _GROUP + _GROUP_LAYER * k
        slot = tl.arange(0, SLOTS).to(tl.int64)
        own = (lane >= tl.load(layer + 5)) & (lane < tl.load(layer + 6))
        row = slot[None, :, None] * n + sample[:, None, None]
        ahead = tl.load(
            hidden_ptr + row * (16 * LAYERS) + 16 * k + lane[None, None, :],
            mask=(sample < n)[:, None, None] & (slot < tl.load(layer + 4))[None, :, None] & own[None, None, :],
            other=0.0,
        )
        sums = sums + (tl.sum(ahead, 1),)
        units = units + (tl.zeros([BLOCK_N, 16], tl.float32),)
        if k > 0:
            column = tl.load(layer + 2) + tl.arange(0, 16)
            at = (tl.load(layer) + column)[None, :, None] * 16 + lane[None, None, :]
            ok = (column < tl.load(layer + 1))[None, :, None]
            w_k = tl.load(weight_pointer(layers_ptr, k, W_TYPE, ALIGNED) + at, mask=ok, other=0)
            weights = weights + (common.as_float32(w_k) * weight_scale(layers_ptr, k),)
    scale, scale_first = weight_scale(layers_ptr, LAYERS), weight_scale(layers_ptr, 0)
    ladj = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
    z, rows, w, w_first = _chunk(
        z_ptr, outputs_ptr, w_ptr, w_first_ptr, width_first, dims, places, widths, sample, n, features, first_row,
        slots, stride_outputs, BLOCK_D, OUTPUT_SLOTS,
    )  # fmt: skip
    for i in range(first_chunk, end_chunk):
        next_z, next_rows, next_w, next_w_first = _chunk(
            z_ptr, outputs_ptr, w_ptr, w_first_ptr, width_first, next_dims, next_places, next_widths, sample, n,
            features, first_row, slots, stride_outputs, BLOCK_D, OUTPUT_SLOTS,
        )  # fmt: skip
        last_dims, last_own_units, next_places, next_widths = _chunk_numbers(
            chunks_ptr + tl.minimum(i + 2, end_chunk - 1) * STRIDE, BLOCK_D, LAYERS
        )
        d = dims[0] + tl.arange(0, BLOCK_D)
        d_ok = (sample < n)[:, None] & ((d >= dims[1]) & (d < dims[2]))[None, :]
        rows += tl.sum(common.as_float32(w) * units[LAYERS - 1][:, :, None], 1) * scale
        shift, u = tl.split(tl.reshape(rows, [BLOCK_N, BLOCK_D, 2]))
        a = triton_map.log_scale(u, limit, epsilon, KIND)
        if SHIFT_FIRST:
            x, term = z * triton_map.exponential(a) + shift, a
        else:
            x, term = (z - shift) * triton_map.exponential(-a), -a
        tl.store(x_ptr + sample[:, None] * features + d[None, :], x, mask=d_ok)
        ladj += tl.where(d_ok, term, 0.0).to(tl.float64)
        added = tl.sum(common.as_float32(w_first) * tl.where(d_ok, x, 0.0)[:, :, None], 1) * scale_first
        new_sums, new_units = (), ()
        for k in tl.static_range(LAYERS):
            total = sums[k] + added
            value = tl.where(total < 0, 0.0, total) if RELU else total
            own = (lane >= own_units[2 * k]) & (lane < own_units[2 * k + 1])
            finished = tl.where(own[None, :], value, 0.0)
            new_sums = new_sums + (total,)
            new_units = new_units + (units[k] + finished,)
            if k + 1 < LAYERS:
                added = tl.sum(weights[k] * finished[:, :, None], 1)
        sums, units = new_sums, new_units
        dims, own_units, next_dims, next_own_units = next_dims, next_own_units, last_dims, last_own_units
        z, rows, w, w_first = next_z, next_rows, next_w, next_w_first
    for k in tl.static_range(LAYERS):
        layer = group_ptr + _GROUP + _GROUP_LAYER * k
        own = (lane >= tl.load(layer + 5)) & (lane < tl.load(layer + 6))
        at = values_ptr + sample[:, None] * stride_values + tl.load(layer + 3) + lane[None, :]
        tl.store(at, units[k], mask=(sample < n)[:, None] & own[None, :])
    so_far = tl.load(ladj_ptr + sample, mask=sample < n, other=0.0)
    tl.store(ladj_ptr + sample, so_far + tl.sum(ladj, 1), mask=sample < n)


@triton.jit
def _finish_units_kernel(
    outputs_ptr, values_ptr, n, units, slots, stride_values, stride_outputs,
    BLOCK: tl.constexpr, RELU: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Units of a hidden layer: the partial sums of their rows, added up in order."""
    overlap.wait(OVERLAP)
    chunks = tl.cdiv(units, BLOCK)
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    j = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(slots):
        total += tl.load(outputs_ptr + (slot * n + sample) * stride_outputs + j, mask=j < units, other=0.0)
    if RELU:
        total = tl.where(total < 0, 0.0, total)
    tl.store(values_ptr + sample * stride_values + j, total, mask=j < units)
