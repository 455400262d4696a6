"""Masked linear layer by Triton kernels; the same functions as ``torch.py``.

    y = act(b + x Wᵀ)

A program takes whole panels of W and walks along the staircase, never outside it: a tile of a panel is a contiguous
right operand ``[columns, 16 rows]``. Few panels cannot fill a GPU: then several programs share a block of them, write
partial sums, and a second kernel adds these up in a fixed order, so that a result never depends on timing. The backward
pass is in ``triton_backward.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.masked_linear.args import LinearArgs, LinearBatch
from fastmaf.kernels.masked_linear.torch import grad_activation
from fastmaf.kernels.masked_linear.triton_backward import adam_steps, products
from fastmaf.kernels.triton_common import device as common
from fastmaf.kernels.triton_common import few_samples, launch_table, overlap, work_lists
from fastmaf.kernels.triton_common.device import why_not
from fastmaf.kernels.triton_common.launch_table import FEW, MOST_LANES
from fastmaf.kernels.triton_common.partial_sums import sum_slots

__all__ = ["adam_", "backward", "forward", "squared_norm", "why_not"]


@triton.jit
def _masked_linear_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, panels_ptr, items_ptr, y_ptr, n, in_features, out_features,
    weight_scale,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, RELU: tl.constexpr, SPLIT: tl.constexpr,
    LANES: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BLOCK_N)  # neighbours take the same weights
    item = items_ptr + tl.program_id(0) // tiles * 5
    block, k_begin, k_end, slot, before = common.forward_item(item)
    if tl.program_id(0) % tiles == 0:
        overlap.prefetch_panels(
            w_ptr, panels_ptr, before, block, out_features, k_begin, k_end, BLOCK_J // 16, PREFETCH, OVERLAP
        )  # fmt: skip
    overlap.wait(OVERLAP)
    first = tl.program_id(0) % tiles * BLOCK_N
    j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    row_ok = j < out_features
    sample = first + tl.arange(0, BLOCK_N)
    if LANES:
        y = few_samples.product(
            x_ptr, first, n, in_features, w_ptr, before, k_begin, k_end, common.whole_vectors(k_end, in_features),
            BLOCK_N, BLOCK_K, TILES, PREFETCH, OVERLAP,
        )  # fmt: skip
    else:
        base, width = common.panels_of(panels_ptr, j, out_features, BLOCK_J)
        y = common.product(
            x_ptr, sample, sample < n, in_features, w_ptr, base, width, k_begin,
            common.whole_vectors(k_end, in_features), BLOCK_N, BLOCK_J, BLOCK_K, PRECISION,
        )  # fmt: skip
    y *= weight_scale
    if SPLIT:
        y_ptr += slot.to(tl.int64) * n * out_features
    else:
        y += tl.load(bias_ptr + j, mask=row_ok, other=0.0)[None, :]
        if RELU:
            y = tl.where(y < 0, 0.0, y)
    to = sample.to(tl.int64)[:, None] * out_features + j[None, :]
    tl.store(y_ptr + to, y, mask=(sample < n)[:, None] & row_ok[None, :])


class Shape(NamedTuple):
    """How ``product`` is launched for a batch.

    Attributes:
        samples, rows, columns: that a program takes at a time.
        programs: how many the work is cut into, where it can be cut.
        prefetch: columns that a program asks for before it may start.
        options: of the launch.
    """

    samples: int
    rows: int
    columns: int
    programs: int
    prefetch: int
    options: dict[str, Any]


def shape_of(like: Tensor, n: int, dtype: torch.dtype = torch.float32, whole: bool = False) -> Shape:
    """Returns how ``product`` is launched for ``n`` samples and weights of a dtype, of which it may be known that a
    program takes all columns of a panel.
    """
    table, sms, precision = common.target(like)
    lanes = n <= MOST_LANES
    few = table.whole if whole else table.lanes if n <= 1 else table.few
    one = few if lanes else table.dot
    most = table.most_samples if dtype == torch.float32 else min(32, table.most_samples)  # unpacking takes registers
    # Of bytes a thread loads 16 weights at once, whose sums for eight samples would take all registers.
    most_lanes = MOST_LANES if dtype.itemsize > 1 else MOST_LANES // 2
    samples = common.power_of_two(n, *((1, most_lanes) if lanes else (FEW, most)))
    programs = common.cdiv(sms * one.programs_per_sm, max(1, common.cdiv(n, samples)))
    options = {"BLOCK_N": samples, "LANES": lanes, "PRECISION": "ieee" if lanes else precision, "num_warps": one.warps}
    if not lanes:
        warps = max(4, one.warps) if precision == "ieee" else one.warps  # there, sums take twice the registers
        options["num_warps"] = warps
        if precision == "ieee" or samples == FEW:
            options["maxnreg"] = common.all_registers(warps, max(1, 320 // (samples * warps)))
        # Pipelined, bfloat16 weights would be converted in the layout of an operand, which spills registers.
        stages = one.stages if dtype == torch.float32 else 1
        options |= {"BLOCK_J": one.rows, "BLOCK_K": one.columns, "TILES": 1, "num_stages": stages}
        prefetch = launch_table.prefetched(one.programs_per_sm, one.rows * dtype.itemsize)
        return Shape(samples, one.rows, one.columns, programs, prefetch, options)
    tiles = max(1, one.stages * dtype.itemsize // 4)  # the tiles of a stage are loaded together, 16 bytes a thread
    options |= {"BLOCK_J": PANEL, "BLOCK_K": one.columns // tiles, "TILES": tiles, "num_stages": 1}
    resident = one.programs_per_sm
    if dtype.itemsize == 1 and n > 1:  # unpacking, again
        resident = max(1, resident * 5 // 6)
    options["maxnreg"] = common.all_registers(one.warps, resident)
    prefetch = launch_table.prefetched(resident, PANEL * dtype.itemsize)
    return Shape(samples, PANEL, one.columns, programs, prefetch, options)


def forward(x: Tensor, args: LinearArgs) -> Tensor:
    """Returns ``y`` ``[N, out]``; the weight may be bfloat16 or bytes beside float32 ``x``."""
    return forward_into(x.new_empty(x.shape[0], args.bias.shape[0]), x, args)


def forward_into(y: Tensor, x: Tensor, args: LinearArgs) -> Tensor:
    """Writes ``forward`` to ``y`` and returns it."""
    (n, in_features), out_features = x.shape, y.shape[1]
    relu, columns = args.activation == "relu", common.target(x).table.whole.columns
    whole = n <= MOST_LANES and in_features <= launch_table.MOST_ROUNDS * columns
    shape = shape_of(x, n, args.weight.dtype, whole)
    panels = work_lists.on_device(args.panels, x.device)
    work = work_lists.forward(args.panels, x.device, shape.rows, shape.columns, 0 if whole else shape.programs)
    split = work.slots > 1
    product_to = x.new_empty(work.slots, n, out_features) if split else y
    common.launch(
        _masked_linear_fwd_kernel,
        len(work.items) * common.cdiv(n, shape.samples),
        x, args.weight, args.bias, panels, work.items, product_to, n, in_features, out_features,
        args.weight_scale,
        RELU=relu, SPLIT=split, PREFETCH=shape.prefetch, **shape.options,
    )  # fmt: skip
    return sum_slots(y, product_to, work.counts, bias=args.bias, relu=relu) if split else y


def backward(batch: LinearBatch, args: LinearArgs, need_inputs: bool, need_weight: bool) -> tuple[Tensor, ...]:
    """Returns the gradients of ``x``, the packed weight and the bias; the first two empty when not needed."""
    x, g = batch.x, _grad_product(batch, args)
    empty = x.new_empty(0)
    if not (need_inputs or need_weight):
        return empty, empty, g.sum(0)
    if not need_weight:
        partial, counts, _ = products(g, x, args, need_x=True)
        return _grad_x(x, partial, counts, True), empty, g.sum(0)
    grad_w = torch.empty_like(args.weight, dtype=x.dtype)
    partial, counts, grad_bias = products(g, x, args, need_x=need_inputs, mode="store", grad_w=grad_w)
    return _grad_x(x, partial, counts, need_inputs), grad_w, grad_bias


def adam_(batch: LinearBatch, args: LinearArgs, need_inputs: bool, update: Update) -> tuple[Tensor, ...]:
    """Takes a step of Adam on the weight, in place; returns the gradients of ``x`` and the bias."""
    x, g = batch.x, _grad_product(batch, args)
    [step] = adam_steps([update], x.device)
    partial, counts, grad_bias = products(g, x, args, need_x=need_inputs, mode="adam", step=step)
    return _grad_x(x, partial, counts, need_inputs), grad_bias


def squared_norm(batch: LinearBatch, args: LinearArgs) -> Tensor:
    """Returns the sum of the squares of the weight's gradient."""
    sums, _, _ = products(_grad_product(batch, args), batch.x, args, need_x=False, mode="norm")
    return sums.double().sum()


def _grad_product(batch: LinearBatch, args: LinearArgs) -> Tensor:
    """Returns the gradient before the activation."""
    return grad_activation(batch.grad_y.contiguous(), batch.y, args.activation)


def _grad_x(x: Tensor, partial: Tensor, counts: Tensor, needed: bool) -> Tensor:
    return sum_slots(torch.empty_like(x), partial, counts) if needed else x.new_empty(0)
