"""Masked linear layer by Triton kernels; the same functions as ``reference.py``.

    y = act(b + x Wᵀ)

A program takes a block of rows of W and walks along the staircase, never outside it. Few rows cannot fill a GPU: then
several programs share a block, write partial sums, and a second kernel adds these up in a fixed order, so that a result
never depends on timing. The way back is in ``triton_backward.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmaf.kernels import work_lists
from fastmaf.kernels.factors import Update
from fastmaf.kernels.launch_table import MOST_LANES
from fastmaf.kernels.masked_linear.triton_backward import adam_step, products, sum_slots
from fastmaf.kernels.triton_parts import MIN_DOT, cdiv, launch, power_of_two, product, target, why_not

__all__ = ["adam_", "backward", "forward", "grad_inputs", "grad_weight_of", "squared_norm", "why_not"]


@triton.jit
def _masked_linear_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, base_ptr, width_ptr, items_ptr, y_ptr, n, in_features, out_features,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, RELU: tl.constexpr, SPLIT: tl.constexpr,
    LANES: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BLOCK_N)  # neighbours take the same weights
    item = items_ptr + tl.program_id(0) // tiles * 4
    block, k_begin, k_end, slot = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    row_ok = j < out_features
    base = tl.load(base_ptr + j, mask=row_ok, other=0)
    width = tl.load(width_ptr + j, mask=row_ok, other=0)
    if ALIGNED:
        base = tl.multiple_of(base, 16)
        width = tl.multiple_of(width, 16)
        k_end = tl.multiple_of(k_end, 16)
        k_begin = tl.multiple_of(k_begin, 16)
    sample = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    y = product(
        x_ptr, sample, sample < n, in_features, w_ptr, base, width, row_ok, k_begin, k_end,
        BLOCK_N, BLOCK_J, BLOCK_K, LANES, PRECISION,
    )  # fmt: skip
    if SPLIT:
        y_ptr += slot.to(tl.int64) * n * out_features
    else:
        y += tl.load(bias_ptr + j, mask=row_ok, other=0.0)[None, :]
        if RELU:
            y = tl.where(y < 0, 0.0, y)
    to = sample.to(tl.int64)[:, None] * out_features + j[None, :]
    tl.store(y_ptr + to, y, mask=(sample < n)[:, None] & row_ok[None, :])


class Shape(NamedTuple):
    """How ``product`` is launched for a batch."""

    lanes: bool
    samples: int
    rows: int
    columns: int
    warps: int
    stages: int
    programs: int


def shape_of(like: Tensor, n: int, aligned: bool) -> Shape:
    """Returns how ``product`` is launched for ``n`` samples and rows of weights that are ``aligned`` or not."""
    table, sms, _ = target(like)
    lanes = n <= MOST_LANES
    one = (table.lanes if n <= 1 else table.few if lanes else table.dot).fitted(aligned)
    samples = power_of_two(n, 1, MOST_LANES) if lanes else power_of_two(n, MIN_DOT, table.most_samples)
    programs = cdiv(sms * one.programs_per_sm, max(1, cdiv(n, samples)))
    return Shape(lanes, samples, one.rows, one.columns, one.warps, one.stages, programs)


def forward(x: Tensor, weight: Tensor, bias: Tensor, prefix: Tensor, tiles: Tensor, activation: str) -> Tensor:
    """Returns ``y`` ``[N, out]``; ``weight`` may be bfloat16 beside float32 ``x``."""
    return forward_into(x.new_empty(x.shape[0], bias.shape[0]), x, weight, bias, tiles, activation)


def forward_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, tiles: Tensor, activation: str) -> Tensor:
    """Writes ``forward`` to ``y`` and returns it."""
    (n, in_features), out_features = x.shape, y.shape[1]
    rows = work_lists.rows(tiles, x.device)
    shape, relu = shape_of(x, n, rows.aligned), activation == "relu"
    work = work_lists.forward(tiles, x.device, shape.rows, shape.columns, shape.programs)
    split = work.slots > 1
    product_to = x.new_empty(work.slots, n, out_features) if split else y
    launch(
        _masked_linear_fwd_kernel,
        len(work.items) * cdiv(n, shape.samples),
        x, weight, bias, rows.base, rows.width, work.items, product_to, n, in_features, out_features,
        BLOCK_N=shape.samples, BLOCK_J=shape.rows, BLOCK_K=shape.columns, RELU=relu, SPLIT=split, LANES=shape.lanes,
        ALIGNED=rows.aligned, PRECISION=target(x).precision, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return sum_slots(y, product_to, work.counts, bias=bias, relu=relu) if split else y


def backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    activation: str,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of ``x`` (empty when not needed), packed ``weight`` (zero in the padding) and ``bias``."""
    grad_w = torch.empty_like(weight, dtype=x.dtype)
    g = _through(grad_y, y, activation)
    partial, counts, grad_bias = products(
        g, x, weight, prefix, tiles, need_x=need_grad_x, mode="store", grad_w=grad_w
    )  # fmt: skip
    return _grad_x(x, partial, counts, need_grad_x), grad_w, grad_bias


def grad_inputs(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    activation: str,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of ``x`` (empty when not needed) and ``bias``."""
    g = _through(grad_y, y, activation)
    if not need_grad_x:
        return x.new_empty(0), g.sum(0)
    partial, counts, _ = products(g, x, weight, prefix, tiles, need_x=True)
    return _grad_x(x, partial, counts, True), g.sum(0)


def grad_weight_of(
    grad_y: Tensor, x: Tensor, y: Tensor, weight: Tensor, prefix: Tensor, tiles: Tensor, activation: str
) -> Tensor:
    """Returns the gradient of the packed ``weight``, zero in the padding."""
    return backward(grad_y, x, y, weight, prefix, tiles, activation, False)[1]


def adam_(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    activation: str,
    need_grad_x: bool,
    update: Update,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Takes a step of Adam with ``scale`` times the gradient of ``weight``; returns what ``grad_inputs`` does."""
    g = _through(grad_y, y, activation)
    step = adam_step(update, x.device, scale)
    partial, counts, grad_bias = products(
        g, x, weight, prefix, tiles, need_x=need_grad_x, mode="adam", step=step
    )  # fmt: skip
    return _grad_x(x, partial, counts, need_grad_x), grad_bias


def squared_norm(
    grad_y: Tensor, x: Tensor, y: Tensor, weight: Tensor, prefix: Tensor, tiles: Tensor, activation: str
) -> Tensor:
    """Returns the sum of the squares of the gradient of ``weight``."""
    sums, _, _ = products(
        _through(grad_y, y, activation), x, weight, prefix, tiles, need_x=False, mode="norm"
    )  # fmt: skip
    return sums.double().sum()


def _through(grad_y: Tensor, y: Tensor, activation: str) -> Tensor:
    """Returns the gradient before the activation."""
    grad_y = grad_y.contiguous()
    return torch.where(y > 0, grad_y, 0) if activation == "relu" else grad_y


def _grad_x(x: Tensor, partial: Tensor, counts: Tensor, need: bool) -> Tensor:
    return sum_slots(torch.empty_like(x), partial, counts) if need else x.new_empty(0)
