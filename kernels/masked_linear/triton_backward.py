"""The backward pass of a masked linear layer by Triton kernels.

    g = grad_y act'(y)          grad_x = g W          grad_W = gᵀ x          grad_b = sum_n g

A program takes a chunk of columns of W and walks down the panels that have it. It reads a tile of W, ``[columns,
rows]`` as it is stored, once for everything: its share of grad_x, its gradient, and a step of Adam on it. For up to
eight samples each thread keeps sums of grad_x over the weights that it loads, and nothing goes through shared memory;
for more, tiles are left operands and results of matrix products. Where chunks are few, several programs share one;
``sum_slots`` adds up their partial sums of grad_x in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmaf.kernels.adam import triton_step
from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.affine_output.args import AffineArgs
from fastmaf.kernels.float8 import BYTE, decode
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.masked_linear.args import LinearArgs
from fastmaf.kernels.triton_common import device as common
from fastmaf.kernels.triton_common import few_samples, launch_table, overlap, work_lists
from fastmaf.kernels.triton_common.launch_table import FEW, MOST_LANES, MOST_SUMMED

WeightMode: TypeAlias = Literal["none", "store", "adam", "norm"]


@triton.jit
def _prefetch_tile(
    w_ptr, exp_avg_ptr, exp_avg_sq_ptr, start, end, BLOCK_K: tl.constexpr, WEIGHT: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Prefetches a tile from column ``start`` on, of a panel that ends at ``end``; moments for Adam as well."""
    numbers = tl.minimum(end - start, BLOCK_K) * 16
    overlap.prefetch(w_ptr, start * 16, numbers, OVERLAP)
    if WEIGHT == "adam":
        overlap.prefetch(exp_avg_ptr, start * 16, numbers, OVERLAP)
        overlap.prefetch(exp_avg_sq_ptr, start * 16, numbers, OVERLAP)


@triton.jit
def _masked_linear_bwd_kernel(
    g_ptr, g_t_ptr, x_ptr, w_ptr, panels_ptr, prefix_ptr, items_ptr, grad_x_ptr, grad_w_ptr, grad_bias_ptr,
    exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, bias_ptr, bias_exp_avg_ptr, bias_exp_avg_sq_ptr, bias_scalars_ptr,
    n, in_features, out_features,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NEED_X: tl.constexpr, WEIGHT: tl.constexpr, BIAS_ADAM: tl.constexpr,
    BIAS_ROWS: tl.constexpr, LANES: tl.constexpr, MANY: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """NEED_X and WEIGHT in one pass are for LANES without MANY, which has all samples in BLOCK_N. NEED_X alone has a
    program per tile of samples. g_t is g transposed, or None with LANES.
    """
    tiles = tl.maximum(tl.cdiv(n, BLOCK_N), 1) if NEED_X else 1  # an empty batch has gradients, zeros
    number = tl.program_id(0) // tiles
    item = items_ptr + number * 4
    column, begin, end, slot = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    column = tl.multiple_of(column, BLOCK_K)
    k = column + tl.arange(0, BLOCK_K)
    k_ok = (k >= 0) & (k < in_features)
    if WEIGHT != "none":  # a program of the bias has rows, and no column
        first_row, end_row = begin, tl.where(column < 0, tl.minimum(end, out_features), begin)
        end = tl.where(column < 0, begin, end)
    first = tl.program_id(0) % tiles * BLOCK_N
    panel = tl.load(panels_ptr + begin, mask=begin < end, other=0)
    panel_end = tl.load(panels_ptr + begin + 1, mask=begin < end, other=0)
    PREFETCHES: tl.constexpr = OVERLAP and (NEED_X or WEIGHT == "adam")
    ahead, ahead_end = panel, panel_end
    if PREFETCHES:
        last = tl.where((begin < end) & (first == 0), end, -1)  # programs of other samples need the same weights
        own = tl.maximum(column, 0)
        starts = ()
        for q in tl.static_range(PREFETCH + 2):
            starts = starts + (tl.load(panels_ptr + begin + q, mask=begin + q <= last, other=0),)  # type: ignore[assignment]
        for q in tl.static_range(PREFETCH):
            _prefetch_tile(
                w_ptr, exp_avg_ptr, exp_avg_sq_ptr, starts[q] + own, starts[q + 1], BLOCK_K, WEIGHT, OVERLAP
            )  # fmt: skip
        ahead, ahead_end = starts[PREFETCH], starts[PREFETCH + 1]
    overlap.wait(OVERLAP)
    x = few_samples.rows_of(x_ptr, n, in_features, k, k_ok, BLOCK_N if LANES and not MANY else 0)
    sums = ()
    for _ in tl.static_range(BLOCK_N if LANES else 0):  # of each sample, input and quarter of a panel
        sums = sums + (tl.zeros([BLOCK_K, 4], tl.float32),)  # type: ignore[assignment]
    grad_x = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_K, 16], tl.float32)
    if WEIGHT == "adam":
        factor, l2, decay, rest1, beta2, rest2, rate, per_root, eps = triton_step.scalars(scalars_ptr)
    for block in range(begin, end):
        j = block * 16 + tl.arange(0, 16)
        row_ok = j < out_features
        at = (panel * 16 + tl.arange(0, 16))[None, :] + (k * 16)[:, None]
        stored = k[:, None] < (tl.zeros([16], tl.int64) + (panel_end - panel)).to(tl.int32)[None, :]
        # All that a tile needs, and where the next one lies, before the first use.
        panel, panel_end = panel_end, tl.load(panels_ptr + block + 2, mask=block + 1 < end, other=0)
        if PREFETCHES:
            _prefetch_tile(w_ptr, exp_avg_ptr, exp_avg_sq_ptr, ahead + own, ahead_end, BLOCK_K, WEIGHT, OVERLAP)
            beyond = block + PREFETCH + 2
            ahead, ahead_end = ahead_end, tl.load(panels_ptr + beyond, mask=beyond <= last, other=0)
        if NEED_X or WEIGHT == "adam":
            w = tl.load(w_ptr + at, mask=stored, other=0.0).to(tl.float32)
        if WEIGHT == "adam":
            m = tl.load(exp_avg_ptr + at, mask=stored, other=0.0)
            v = tl.load(exp_avg_sq_ptr + at, mask=stored, other=0.0)
        if WEIGHT != "none":
            prefix = tl.load(prefix_ptr + j, mask=row_ok, other=0).to(tl.int32)
        grad_w = tl.zeros([BLOCK_K, 16], tl.float32)
        if LANES and not MANY:
            g = few_samples.rows_of(g_ptr, n, out_features, j, row_ok, BLOCK_N)
            if NEED_X:
                sums = few_samples.add_dots(sums, w, g)
            if WEIGHT != "none":
                grad_w = few_samples.outer(x, g)
        elif LANES:
            # Zeros, but of a load: sums of a loop are in the layout of what it starts with.
            grad_w = tl.load(w_ptr + at, mask=stored & (k * 0 + n < 0)[:, None], other=0.0).to(tl.float32)
            for start in range(0, n, BLOCK_N):
                row = tl.full([], 0, tl.int64) + start
                xs = few_samples.rows_of(x_ptr + row * in_features, n - start, in_features, k, k_ok, BLOCK_N)
                gs = few_samples.rows_of(g_ptr + row * out_features, n - start, out_features, j, row_ok, BLOCK_N)
                grad_w += few_samples.outer(xs, gs)
        elif NEED_X:
            sample = first + tl.arange(0, BLOCK_N)
            g_t_at = g_t_ptr + j.to(tl.int64)[:, None] * n + sample[None, :]
            g_t = tl.load(g_t_at, mask=row_ok[:, None] & (sample < n)[None, :], other=0.0)
            grad_x = common.matmul(w, g_t, grad_x, PRECISION)
        else:
            for start in range(0, n, BLOCK_N):
                sample = start + tl.arange(0, BLOCK_N)
                ok, at_n = (sample < n)[:, None], sample.to(tl.int64)[:, None]
                g2 = tl.load(g_ptr + at_n * out_features + j[None, :], mask=ok & row_ok[None, :], other=0.0)
                x2 = tl.load(x_ptr + at_n * in_features + k[None, :], mask=ok & k_ok[None, :], other=0.0)
                grad_w = common.matmul(tl.trans(x2), g2, grad_w, PRECISION)
        if WEIGHT != "none":
            grad_w = tl.where(k[:, None] < prefix[None, :], grad_w, 0.0)  # the padding stays zero
            if WEIGHT == "store":
                tl.store(grad_w_ptr + at, grad_w, mask=stored)
            if WEIGHT == "norm":
                square += grad_w * grad_w
            if WEIGHT == "adam":
                w, m, v = triton_step.step(w, m, v, grad_w, factor, l2, decay, rest1, beta2, rest2, rate, per_root, eps)
                tl.store(w_ptr + at, w, mask=stored)
                tl.store(exp_avg_ptr + at, m, mask=stored)
                tl.store(exp_avg_sq_ptr + at, v, mask=stored)
    if WEIGHT != "none":
        for start in range(first_row, end_row, BIAS_ROWS):
            j = start + tl.arange(0, BIAS_ROWS)
            row_ok = j < end_row
            grad_bias = tl.zeros([BIAS_ROWS], tl.float32)
            for of_bias in range(0, n, 8):
                rows = g_ptr + (tl.full([], 0, tl.int64) + of_bias) * out_features
                grad_bias += few_samples.total(few_samples.rows_of(rows, n - of_bias, out_features, j, row_ok, 8))
            if BIAS_ADAM:
                b = tl.load(bias_ptr + j, mask=row_ok, other=0.0)
                bm = tl.load(bias_exp_avg_ptr + j, mask=row_ok, other=0.0)
                bv = tl.load(bias_exp_avg_sq_ptr + j, mask=row_ok, other=0.0)
                f, ridge, d, r1, b2, r2, s, r, e = triton_step.scalars(bias_scalars_ptr)
                b, bm, bv = triton_step.step(b, bm, bv, grad_bias, f, ridge, d, r1, b2, r2, s, r, e)
                tl.store(bias_ptr + j, b, mask=row_ok)
                tl.store(bias_exp_avg_ptr + j, bm, mask=row_ok)
                tl.store(bias_exp_avg_sq_ptr + j, bv, mask=row_ok)
            else:
                tl.store(grad_bias_ptr + j, grad_bias, mask=row_ok)
    if NEED_X:
        found = tl.trans(tl.reshape(tl.sum(few_samples.stacked(sums), 1), [BLOCK_K, BLOCK_N]) if LANES else grad_x)
        sample = first + tl.arange(0, BLOCK_N)
        to = (slot.to(tl.int64) * n + sample)[:, None] * in_features + k[None, :]
        tl.store(grad_x_ptr + to, found, mask=(sample < n)[:, None] & k_ok[None, :])
    if WEIGHT == "norm":
        tl.store(grad_w_ptr + number, tl.sum(tl.sum(square, 1), 0))


def products(
    g: Tensor,
    x: Tensor,
    args: LinearArgs | AffineArgs,
    *,
    need_x: bool,
    mode: WeightMode = "none",
    grad_w: Tensor | None = None,
    step: Update | None = None,
    bias_step: Update | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forms the gradients that follow from ``g`` ``[N, out]``, that of a layer's product, in one pass over the weight
    where possible.

    Args:
        need_x: form the gradient of x.
        mode: how the weight gradient is consumed: not formed, stored in ``grad_w``, applied as a step of Adam, or its
            squares added up, one sum per program, in ``grad_w``.
        step: of Adam on the weight; one of ``adam_steps``.
        bias_step: with the step on the weight, take one on the bias, whose gradient is then not returned.

    Returns:
        Partial sums ``[slots, N, in]`` of the gradient of x, and their counts for ``sum_slots`` (both empty when not
        needed); the gradient of the bias (empty without the weight's). With ``mode="norm"`` the sums of squares come
        first.
    """
    table, sms, precision = common.target(x)
    (n, out_features), in_features = g.shape, x.shape[1]
    few = n <= MOST_LANES
    if need_x and mode != "none" and not few:  # the gradient of x first: Adam changes the weight
        partial, counts, _ = products(g, x, args, need_x=True)
        _, _, grad_bias = products(g, x, args, need_x=False, mode=mode, grad_w=grad_w, step=step, bias_step=bias_step)
        return partial, counts, grad_bias
    lanes = few or (mode != "none" and n <= table.most_samples)
    most = table.most_samples if mode == "none" else MOST_SUMMED
    samples = common.power_of_two(n, *((1, MOST_LANES) if lanes else (FEW, most)))
    one = table.backward if lanes else table.backward_many
    resident = one.programs_per_sm if few or not lanes else min(2, one.programs_per_sm)  # a loop over samples has more
    programs = common.cdiv(sms * resident, max(1, common.cdiv(n, samples)) if mode == "none" else 1)
    prefetch = launch_table.prefetched(resident, (12 if mode == "adam" else 4) * PANEL * one.columns)
    panels = work_lists.on_device(args.panels, x.device)
    bias_rows = 4 * 32 * one.warps  # 16 bytes a thread
    work = work_lists.backward(
        args.panels, x.device, in_features, PANEL, one.columns, programs, bias_rows if mode != "none" else 0
    )
    partial = x.new_empty(work.slots if need_x else 0, n, in_features)
    grad_bias = x.new_empty(out_features if mode != "none" and bias_step is None else 0)
    g_t = g.t().contiguous() if need_x and not few else None  # the right operand of a matrix product
    if mode == "norm":
        assert grad_w is None
        grad_w = x.new_empty(len(work.items))
    weight = decode(args.weight, args.weight_scale, x.dtype) if args.weight.dtype == BYTE else args.weight
    adam, bias_adam = ((u.exp_avg, u.exp_avg_sq, u.scalars) if u else (None,) * 3 for u in (step, bias_step))
    common.launch(
        _masked_linear_bwd_kernel,
        len(work.items) * (common.cdiv(n, samples) if mode == "none" else 1),
        g, g_t, x, weight, panels, args.prefix, work.items, partial, grad_w, grad_bias, *adam,
        args.bias if bias_step is not None else None, *bias_adam, n, in_features, out_features,
        BLOCK_N=samples, BLOCK_K=one.columns, NEED_X=need_x, WEIGHT=mode, BIAS_ADAM=bias_step is not None,
        BIAS_ROWS=bias_rows, LANES=lanes, MANY=n > MOST_LANES, PRECISION="ieee" if lanes else precision,
        PREFETCH=prefetch,
        num_warps=one.warps, num_stages=one.stages,
        maxnreg=common.all_registers(one.warps, resident if lanes else 1),
    )  # fmt: skip
    if mode == "norm":
        assert grad_w is not None
        return grad_w, work.counts, grad_bias
    return partial, work.counts, grad_bias


def adam_steps(updates: Sequence[Update], device: torch.device) -> list[Update]:
    """Returns updates with their scalars on the device; those that lie there already are taken as they are."""
    ready = [update.scalars for update in updates if update.scalars is not None]
    if len(ready) < len(updates):
        rows = [update.numbers.kernel_scalars(update.scale) for update in updates]
        # From pinned memory, so that nothing waits for the device.
        host = torch.tensor(rows, dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda")
        ready = list(host.to(device, non_blocking=True).unbind())
    return [update._replace(scalars=scalars) for update, scalars in zip(updates, ready, strict=True)]
