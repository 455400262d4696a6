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

from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.affine_output.args import AffineArgs
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.masked_linear.args import LinearArgs
from fastmaf.kernels.triton_common import device as common
from fastmaf.kernels.triton_common import work_lists
from fastmaf.kernels.triton_common.launch_table import FEW, MOST_LANES

WeightMode: TypeAlias = Literal["none", "store", "adam", "norm"]


@triton.jit
def _sum_slots_kernel(
    partial_ptr, counts_ptr, bias_ptr, act_ptr, add_ptr, out_ptr, n, features,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, MASK: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Adds up partial sums ``[slots, n, features]``, of which column c has ``counts[c]``, in a fixed order."""
    chunks = tl.cdiv(features, BLOCK_C)
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < features
    count = tl.load(counts_ptr + c, mask=ok, other=0)
    at = sample * features + c
    y = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, tl.max(count, 0), BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        from_ = partial_ptr + slot.to(tl.int64)[:, None] * n * features + at[None, :]
        y += tl.sum(tl.load(from_, mask=(slot[:, None] < count[None, :]) & ok[None, :], other=0.0), 0)
    if BIAS:
        y += tl.load(bias_ptr + c, mask=ok, other=0.0)
    if RELU:
        y = tl.where(y < 0, 0.0, y)
    if MASK:  # back through a ReLU whose value was act
        y = tl.where(tl.load(act_ptr + at, mask=ok, other=0.0) > 0, y, 0.0)
    if ADD:
        y += tl.load(add_ptr + at, mask=ok, other=0.0)
    tl.store(out_ptr + at, y, mask=ok)


@triton.jit
def _masked_linear_bwd_kernel(
    g_ptr, g_t_ptr, x_ptr, w_ptr, panels_ptr, prefix_ptr, items_ptr, grad_x_ptr, grad_w_ptr, grad_bias_ptr,
    exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, bias_ptr, bias_exp_avg_ptr, bias_exp_avg_sq_ptr, bias_scalars_ptr,
    n, in_features, out_features,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NEED_X: tl.constexpr, WEIGHT: tl.constexpr, BIAS_ADAM: tl.constexpr,
    LANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With LANES, and with both NEED_X and WEIGHT, all samples must fit into BLOCK_N; NEED_X alone has a program per
    tile of them. g_t is g transposed, or None with LANES.
    """
    tiles = tl.maximum(tl.cdiv(n, BLOCK_N), 1) if NEED_X else 1  # an empty batch has gradients, zeros
    number = tl.program_id(0) // tiles
    item = items_ptr + number * 4
    column, begin, end, slot = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    column = tl.multiple_of(column, BLOCK_K)
    k = column + tl.arange(0, BLOCK_K)
    k_ok = k < in_features
    first = tl.program_id(0) % tiles * BLOCK_N
    panel = tl.load(panels_ptr + begin, mask=begin < end, other=0)
    panel_end = tl.load(panels_ptr + begin + 1, mask=begin < end, other=0)
    x, sums = _inputs(x_ptr, n, in_features, k, k_ok, BLOCK_N if LANES else 0)
    grad_x = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_K, 16], tl.float32)
    if WEIGHT == "adam":
        factor, l2, decay, rest1, beta2, rest2, step_size, root, eps = common.adam_scalars(scalars_ptr)
    for block in range(begin, end):
        j = block * 16 + tl.arange(0, 16)
        row_ok = j < out_features
        at = (panel * 16 + tl.arange(0, 16))[None, :] + (k * 16)[:, None]
        stored = k[:, None] < (tl.zeros([16], tl.int64) + (panel_end - panel)).to(tl.int32)[None, :]
        # All that a tile needs, and where the next one lies, before the first use.
        panel, panel_end = panel_end, tl.load(panels_ptr + block + 2, mask=block + 1 < end, other=0)
        if NEED_X or WEIGHT == "adam":
            w = tl.load(w_ptr + at, mask=stored, other=0.0).to(tl.float32)
        if WEIGHT == "adam":
            m = tl.load(exp_avg_ptr + at, mask=stored, other=0.0)
            v = tl.load(exp_avg_sq_ptr + at, mask=stored, other=0.0)
        if WEIGHT != "none":
            prefix = tl.load(prefix_ptr + j, mask=row_ok, other=0).to(tl.int32)
        grad_w = tl.zeros([BLOCK_K, 16], tl.float32)
        grad_bias = tl.zeros([16], tl.float32)
        if LANES:
            g = _rows(g_ptr, n, out_features, j, row_ok, BLOCK_N)
            if NEED_X:
                sums = _add_dots(sums, w, g, BLOCK_N)
            if WEIGHT != "none":
                for lane in tl.static_range(BLOCK_N):
                    grad_w += x[lane][:, None] * g[lane][None, :]
        else:
            for start in range(first, n if WEIGHT != "none" else first + 1, BLOCK_N):
                sample = start + tl.arange(0, BLOCK_N)
                if NEED_X:
                    g_t_at = g_t_ptr + j.to(tl.int64)[:, None] * n + sample[None, :]
                    g_t = tl.load(g_t_at, mask=row_ok[:, None] & (sample < n)[None, :], other=0.0)
                    grad_x = common.matmul(w, g_t, grad_x, PRECISION)
                if WEIGHT != "none":
                    ok, at_n = (sample < n)[:, None], sample.to(tl.int64)[:, None]
                    g2 = tl.load(g_ptr + at_n * out_features + j[None, :], mask=ok & row_ok[None, :], other=0.0)
                    x2 = tl.load(x_ptr + at_n * in_features + k[None, :], mask=ok & k_ok[None, :], other=0.0)
                    grad_w = common.matmul(tl.trans(x2), g2, grad_w, PRECISION)
                    grad_bias += tl.sum(g2, 0)
        if WEIGHT != "none":
            grad_w = tl.where(k[:, None] < prefix[None, :], grad_w, 0.0)  # the padding stays zero
            if WEIGHT == "store":
                tl.store(grad_w_ptr + at, grad_w, mask=stored)
            if WEIGHT == "norm":
                square += grad_w * grad_w
            if WEIGHT == "adam":
                w, m, v = common.adam(w, m, v, grad_w, factor, l2, decay, rest1, beta2, rest2, step_size, root, eps)
                tl.store(w_ptr + at, w, mask=stored)
                tl.store(exp_avg_ptr + at, m, mask=stored)
                tl.store(exp_avg_sq_ptr + at, v, mask=stored)
            if column == 0:
                if LANES:
                    for i in range(n):
                        grad_bias += tl.load(g_ptr + i * out_features + j, mask=row_ok, other=0.0)
                if BIAS_ADAM:
                    b = tl.load(bias_ptr + j, mask=row_ok, other=0.0)
                    bm = tl.load(bias_exp_avg_ptr + j, mask=row_ok, other=0.0)
                    bv = tl.load(bias_exp_avg_sq_ptr + j, mask=row_ok, other=0.0)
                    f, ridge, d, r1, b2, r2, s, r, e = common.adam_scalars(bias_scalars_ptr)
                    b, bm, bv = common.adam(b, bm, bv, grad_bias, f, ridge, d, r1, b2, r2, s, r, e)
                    tl.store(bias_ptr + j, b, mask=row_ok)
                    tl.store(bias_exp_avg_ptr + j, bm, mask=row_ok)
                    tl.store(bias_exp_avg_sq_ptr + j, bv, mask=row_ok)
                else:
                    tl.store(grad_bias_ptr + j, grad_bias, mask=row_ok)
    if NEED_X:
        found = tl.trans(tl.reshape(tl.sum(common.stacked(sums), 1), [BLOCK_K, BLOCK_N]) if LANES else grad_x)
        sample = first + tl.arange(0, BLOCK_N)
        to = (slot.to(tl.int64) * n + sample)[:, None] * in_features + k[None, :]
        tl.store(grad_x_ptr + to, found, mask=(sample < n)[:, None] & k_ok[None, :])
    if WEIGHT == "norm":
        tl.store(grad_w_ptr + number, tl.sum(tl.sum(square, 1), 0))


@triton.jit
def _inputs(x_ptr, n, in_features, k, k_ok, BLOCK_N: tl.constexpr):
    """Of each sample its inputs k, and a sum for each of them and each quarter of a panel."""
    x, sums = (), ()
    for i in tl.static_range(BLOCK_N):
        x = x + (tl.load(x_ptr + i * in_features + k, mask=k_ok & (k * 0 + i < n), other=0.0),)
        sums = sums + (tl.zeros([k.shape[0], 4], tl.float32),)
    return x, sums


@triton.jit
def _rows(g_ptr, n, out_features, j, row_ok, BLOCK_N: tl.constexpr):
    g = ()
    for i in tl.static_range(BLOCK_N):
        g = g + (tl.load(g_ptr + i * out_features + j, mask=row_ok & (j * 0 + i < n), other=0.0),)
    return g


@triton.jit
def _add_dots(sums, w, g, BLOCK_N: tl.constexpr):
    """Adds w g to the sums of each sample; a thread adds up the four neighbours that it loads at once."""
    added = ()
    for i in tl.static_range(BLOCK_N):
        added = added + (sums[i] + tl.sum(tl.reshape(w * g[i][None, :], [w.shape[0], 4, 4]), 2),)
    return added


def sum_slots(
    out: Tensor,
    partial: Tensor,
    counts: Tensor,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
    act: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Adds up partial sums ``[slots, N, C]`` into ``out`` ``[N, C]``, which it returns.

    Args:
        counts: int32 ``[C]``, how many of them each column has.
        bias: ``[C]``, added; then a ReLU, if ``relu``.
        act: ``[N, C]``, a ReLU's value: only where it is positive does the sum pass.
        add: ``[N, C]``, added last.
    """
    n, features = out.shape
    slots = common.power_of_two(partial.numel() // max(1, out.numel()), 1, 128)  # all of a column in one round
    columns = 32 if slots > 1 else 256
    common.launch(
        _sum_slots_kernel,
        n * common.cdiv(features, columns),
        partial, counts, bias, act, add, out, n, features,
        BLOCK_S=slots, BLOCK_C=columns, BIAS=bias is not None, RELU=relu, MASK=act is not None, ADD=add is not None,
        num_warps=4 if slots > 4 else 1,
    )  # fmt: skip
    return out


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
    lanes = n <= MOST_LANES
    samples = common.power_of_two(n, *((1, MOST_LANES) if lanes else (FEW, table.most_samples)))
    one = table.backward_of(samples)
    if need_x and mode != "none" and n > samples:  # the gradient of x first: Adam changes the weight
        partial, counts, _ = products(g, x, args, need_x=True)
        _, _, grad_bias = products(g, x, args, need_x=False, mode=mode, grad_w=grad_w, step=step, bias_step=bias_step)
        return partial, counts, grad_bias
    programs = common.cdiv(sms * one.programs_per_sm, max(1, common.cdiv(n, samples)) if mode == "none" else 1)
    panels = work_lists.on_device(args.panels, x.device)
    work = work_lists.backward(args.panels, x.device, in_features, PANEL, one.columns, programs)
    partial = x.new_empty(work.slots if need_x else 0, n, in_features)
    grad_bias = x.new_empty(out_features if mode != "none" and bias_step is None else 0)
    g_t = g.t().contiguous() if need_x and not lanes else None  # the right operand of a matrix product
    if mode == "norm":
        assert grad_w is None
        grad_w = x.new_empty(len(work.items))
    adam, bias_adam = ((u.exp_avg, u.exp_avg_sq, u.scalars) if u else (None,) * 3 for u in (step, bias_step))
    common.launch(
        _masked_linear_bwd_kernel,
        len(work.items) * (common.cdiv(n, samples) if mode == "none" else 1),
        g, g_t, x, args.weight, panels, args.prefix, work.items, partial, grad_w, grad_bias, *adam,
        args.bias if bias_step is not None else None, *bias_adam, n, in_features, out_features,
        BLOCK_N=samples, BLOCK_K=one.columns, NEED_X=need_x, WEIGHT=mode,
        BIAS_ADAM=bias_step is not None, LANES=lanes, PRECISION="ieee" if lanes else precision,
        num_warps=one.warps, num_stages=one.stages, maxnreg=common.all_registers(one.warps, one.programs_per_sm if lanes else 1),
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
