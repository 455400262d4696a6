"""The inverse as it was before its steps were taken in groups: a program takes a tile of samples through all steps.

Only ``parts.py`` uses it, to time the groups of ``fastmaf.kernels.flow.triton`` against it. All weights are read by the
few multiprocessors that have a program. For blocks of two hidden layers and float32 weights.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmaf.kernels.affine_output import triton_map
from fastmaf.kernels.affine_output.affine_map import SHIFT_FIRST
from fastmaf.kernels.flow.args import FlowArgs
from fastmaf.kernels.triton_common import device as common
from fastmaf.kernels.triton_common import few_samples, work_lists
from fastmaf.kernels.triton_common.launch_table import MOST_LANES

_WARPS = 8
_COLUMNS = 8 * _WARPS  # of a tile: a thread loads 16 bytes of each


@triton.jit
def _panel(
    x_ptr, first, n, columns, w_ptr, panels_ptr, bias_ptr, panel, rows, finished,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A panel's rows, of which those that read finished columns alone are right: ``[BLOCK_N, 16]``."""
    start, end = tl.load(panels_ptr + panel), tl.load(panels_ptr + panel + 1)
    columns_end = tl.minimum((end - start).to(tl.int32), finished)
    j = panel * 16 + tl.arange(0, 16)
    y = few_samples.product(
        x_ptr, first, n, columns, w_ptr, start, 0, columns_end, columns_end, BLOCK_N, BLOCK_K, 2, 0, False,
    )  # fmt: skip
    return y + tl.load(bias_ptr + j, mask=j < rows, other=0.0)[None, :]


@triton.jit
def _finish(
    y_ptr, x_ptr, first, n, columns, w_ptr, panels_ptr, bias_ptr, units, begin, end, finished,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Writes the units begin..end of a hidden layer."""
    sample = first + tl.arange(0, BLOCK_N)
    for panel in range(begin // 16, tl.cdiv(end, 16)):
        y = _panel(
            x_ptr, first, n, columns, w_ptr, panels_ptr, bias_ptr, panel, units, finished, BLOCK_N, BLOCK_K
        )  # fmt: skip
        if RELU:
            y = tl.where(y < 0, 0.0, y)
        j = panel * 16 + tl.arange(0, 16)
        ok = (sample < n)[:, None] & ((j >= begin) & (j < end))[None, :]
        tl.store(y_ptr + sample.to(tl.int64)[:, None] * units + j[None, :], y, mask=ok)


@triton.jit
def _level_inverse_kernel(
    z_ptr, x_ptr, h1_ptr, h2_ptr, ladj_ptr, w1_ptr, b1_ptr, panels1_ptr, w2_ptr, b2_ptr, panels2_ptr, wo_ptr, bo_ptr,
    panelso_ptr, schedule_ptr, steps, n, features, units1, units2, limit, epsilon,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RELU: tl.constexpr, SHIFT_FIRST: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    sample = first + tl.arange(0, BLOCK_N)
    row = sample.to(tl.int64)[:, None] * features
    ladj = tl.zeros([BLOCK_N], tl.float64)
    d_begin, begin1, begin2 = 0, 0, 0
    for step in range(steps):
        d_end, end1, end2 = (
            tl.load(schedule_ptr + 3 * step),
            tl.load(schedule_ptr + 3 * step + 1),
            tl.load(schedule_ptr + 3 * step + 2),
        )
        for panel in range(d_begin // 8, tl.cdiv(d_end, 8)):
            rows = _panel(
                h2_ptr, first, n, units2, wo_ptr, panelso_ptr, bo_ptr, panel, 2 * features, begin2, BLOCK_N, BLOCK_K
            )  # fmt: skip
            shift, u = tl.split(tl.reshape(rows, [BLOCK_N, 8, 2]))
            d = panel * 8 + tl.arange(0, 8)
            ok = (sample < n)[:, None] & ((d >= d_begin) & (d < d_end))[None, :]
            z = tl.load(z_ptr + row + d[None, :], mask=ok, other=0.0)
            a = triton_map.log_scale(u, limit, epsilon, KIND)
            if SHIFT_FIRST:
                x, term = z * triton_map.exponential(a) + shift, a
            else:
                x, term = (z - shift) * triton_map.exponential(-a), -a
            tl.store(x_ptr + row + d[None, :], x, mask=ok)
            ladj += tl.sum(tl.where(ok, term, 0.0).to(tl.float64), 1)
        tl.debug_barrier()
        _finish(
            h1_ptr, x_ptr, first, n, features, w1_ptr, panels1_ptr, b1_ptr, units1, begin1, end1, d_end,
            BLOCK_N, BLOCK_K, RELU,
        )  # fmt: skip
        tl.debug_barrier()
        _finish(
            h2_ptr, h1_ptr, first, n, units1, w2_ptr, panels2_ptr, b2_ptr, units2, begin2, end2, end1,
            BLOCK_N, BLOCK_K, RELU,
        )  # fmt: skip
        tl.debug_barrier()
        d_begin, begin1, begin2 = d_end, end1, end2
    so_far = tl.load(ladj_ptr + sample, mask=sample < n, other=0.0)
    tl.store(ladj_ptr + sample, so_far + ladj, mask=sample < n)


def inverse_block(z: Tensor, ladj: Tensor, args: FlowArgs, block: int) -> Tensor:
    """Returns x of a block, and adds to ``ladj``, as ``fastmaf.kernels.flow.triton.inverse._inverse_block`` does."""
    layers, affine_map, (n, features) = args.layers_of_blocks()[block], args.map(block), z.shape
    if len(layers) != 3:
        raise ValueError(f"a block must have two hidden layers; found {len(layers) - 1}")
    panels = [work_lists.on_device(args.panels[i], z.device) for i in layers]
    parts = [part for i, of in zip(layers, panels, strict=True) for part in (args.weights[i], args.biases[i], of)]
    schedule = work_lists.on_device(args.schedules[block], z.device)
    units = [len(args.biases[i]) for i in layers[:-1]]
    x, samples = z.new_empty(n, features), common.power_of_two(n, 1, MOST_LANES)
    common.launch(
        _level_inverse_kernel,
        common.cdiv(n, samples),
        z, x, *(z.new_empty(n, count) for count in units), ladj, *parts, schedule, len(schedule), n, features, *units,
        affine_map.limit, affine_map.epsilon,
        BLOCK_N=samples, BLOCK_K=_COLUMNS, RELU=args.activation == "relu",
        SHIFT_FIRST=affine_map.form == SHIFT_FIRST, KIND=triton_map.kind_of(affine_map), num_warps=_WARPS,
    )  # fmt: skip
    return x
