"""Sums of the partial sums that several programs have written, in a fixed order: no result depends on timing."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmaf.kernels.triton_common import device as common
from fastmaf.kernels.triton_common import overlap

# A thread adds up so many sums of a column by itself; more are shared by several. Twelve take 70 registers of Turing.
MOST_IN_A_THREAD = tl.constexpr(8)


@triton.jit
def _sum_slots_kernel(
    partial_ptr, counts_ptr, bias_ptr, act_ptr, add_ptr, out_ptr, n, features,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, MASK: tl.constexpr,
    ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Adds up partial sums ``[slots, n, features]``, of which column c has ``counts[c]``, in a fixed order."""
    chunks = tl.cdiv(features, BLOCK_C)
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < features
    count = tl.load(counts_ptr + c, mask=ok, other=0)
    overlap.wait(OVERLAP)
    at = sample * features + c
    y = tl.zeros([BLOCK_C], tl.float32)
    if BLOCK_S <= MOST_IN_A_THREAD:
        count = tl.max_constancy(count, 16)  # a panel's, or one of a chunk of columns: 16 bytes are loaded at once
        for slot in tl.static_range(BLOCK_S):
            from_ = partial_ptr + tl.full([], slot, tl.int64) * n * features + at
            y += tl.load(from_, mask=ok & (slot < count), other=0.0)
    else:
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
        counts: int32 ``[C]``, how many of them each column has: one number for each 16 columns from a multiple of 16.
        bias: ``[C]``, added; then a ReLU, if ``relu``.
        act: ``[N, C]``, a ReLU's value: only where it is positive does the sum pass.
        add: ``[N, C]``, added last.
    """
    n, features = out.shape
    slots = partial.numel() // max(1, out.numel())
    few = slots <= MOST_IN_A_THREAD.value
    slots = slots if few else common.power_of_two(slots, 1, 128)  # all of a column in one round
    columns = 128 if few else 32
    common.launch(
        _sum_slots_kernel,
        n * common.cdiv(features, columns),
        partial, counts, bias, act, add, out, n, features,
        BLOCK_S=slots, BLOCK_C=columns, BIAS=bias is not None, RELU=relu, MASK=act is not None, ADD=add is not None,
        num_warps=1 if few else 4,
    )  # fmt: skip
    return out
