"""Output layer fused with the affine transform, by Triton kernels; the same functions as ``torch.py``.

    (m, u)[d] = b + W h,   a = log_scale(u),   z = (x - m) exp(-a),   ladj = -sum_d a[d]       or
                                               z = exp(a) x + m,      ladj = +sum_d a[d]       see affine_map.py

A dimension's two rows stand side by side, so a program ends in z, a, and its share of the log-determinant; the
[N, 2D] product never leaves its registers. Shares of the log-determinant are added up in float64, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.affine_output import triton_map
from fastmaf.kernels.affine_output.affine_map import SHIFT_FIRST, AffineMap
from fastmaf.kernels.affine_output.args import AffineArgs, AffineBatch
from fastmaf.kernels.affine_output.torch import product_batch
from fastmaf.kernels.masked_linear import triton as linear
from fastmaf.kernels.triton_common import device as common
from fastmaf.kernels.triton_common import few_samples, overlap, work_lists
from fastmaf.kernels.triton_common.device import why_not

__all__ = ["adam_", "backward", "forward", "squared_norm", "why_not"]


@triton.jit
def _affine_output_fwd_kernel(
    h_ptr, w_ptr, bias_ptr, x_ptr, panels_ptr, items_ptr, z_ptr, log_scale_ptr, shares_ptr, limit, epsilon, n, hidden,
    features, weight_scale,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, SHIFT_FIRST: tl.constexpr, KIND: tl.constexpr,
    LANES: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr, PREFETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BLOCK_N)
    item = items_ptr + tl.program_id(0) // tiles * 5
    block, _, k_end, _, before = common.forward_item(item)
    if tl.program_id(0) % tiles == 0:
        overlap.prefetch_panels(
            w_ptr, panels_ptr, before, block, 2 * features, 0, k_end, BLOCK_J // 16, PREFETCH, OVERLAP
        )  # fmt: skip
    overlap.wait(OVERLAP)
    first = tl.program_id(0) % tiles * BLOCK_N
    j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    sample = first + tl.arange(0, BLOCK_N)
    if LANES:
        out = few_samples.product(
            h_ptr, first, n, hidden, w_ptr, before, 0, k_end, common.whole_vectors(k_end, hidden),
            BLOCK_N, BLOCK_K, TILES, PREFETCH, OVERLAP,
        )  # fmt: skip
    else:
        base, width = common.panels_of(panels_ptr, j, 2 * features, BLOCK_J)
        out = common.product(
            h_ptr, sample, sample < n, hidden, w_ptr, base, width, 0, common.whole_vectors(k_end, hidden),
            BLOCK_N, BLOCK_J, BLOCK_K, PRECISION,
        )  # fmt: skip
    shift, u = tl.split(tl.reshape(out * weight_scale, [BLOCK_N, BLOCK_J // 2, 2]))
    d = block * (BLOCK_J // 2) + tl.arange(0, BLOCK_J // 2)
    ok = (sample < n)[:, None] & (d < features)[None, :]
    # For each sample anew: loads of one number a thread, whose layout is then that of all that follows. The sums have
    # copies in many threads.
    of_bias = bias_ptr + 2 * d[None, :] + tl.zeros([BLOCK_N, 1], tl.int32)
    shift += tl.load(of_bias, mask=ok, other=0.0)
    u += tl.load(of_bias + 1, mask=ok, other=0.0)
    at = tl.arange(0, BLOCK_N)[:, None] * features + d[None, :]
    row = (tl.full([], 0, tl.int64) + first) * features  # 64 bits once, not in the registers of every number
    x_ptr, z_ptr, log_scale_ptr = x_ptr + row, z_ptr + row, log_scale_ptr + row
    a = triton_map.log_scale(u, limit, epsilon, KIND)
    x = tl.load(x_ptr + at, mask=ok, other=0.0)
    if SHIFT_FIRST:
        z, ladj = (x - shift) * triton_map.exponential(-a), -a
    else:
        z, ladj = x * triton_map.exponential(a) + shift, a
    tl.store(z_ptr + at, z, mask=ok)
    tl.store(log_scale_ptr + at, a, mask=ok)
    share = tl.sum(tl.where(ok, ladj, 0.0).to(tl.float64), 1)
    tl.store(shares_ptr + block.to(tl.int64) * n + sample, share, mask=sample < n)


@triton.jit
def _affine_output_grad_kernel(
    grad_z_ptr, grad_ladj_ptr, grad_a_ptr, of_ptr, log_scale_ptr, g_ptr, grad_x_ptr, limit, epsilon, n, features,
    BLOCK_D: tl.constexpr, SHIFT_FIRST: tl.constexpr, KIND: tl.constexpr, GRAD_A: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The gradients of the layer's product [N, 2D] and of x; ``of`` is z with SHIFT_FIRST, else x."""
    overlap.wait(OVERLAP)
    chunks = tl.cdiv(features, BLOCK_D)
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = d < features
    at = sample * features + d
    a = tl.load(log_scale_ptr + at, mask=ok, other=0.0)
    grad_z = tl.load(grad_z_ptr + at, mask=ok, other=0.0)
    of, grad_ladj = tl.load(of_ptr + at, mask=ok, other=0.0), tl.load(grad_ladj_ptr + sample)
    if SHIFT_FIRST:
        grad_x = grad_z * triton_map.exponential(-a)
        grad_m, grad_a = -grad_x, -grad_z * of - grad_ladj
    else:
        grad_x = grad_z * triton_map.exponential(a)
        grad_m, grad_a = grad_z, grad_x * of + grad_ladj
    if GRAD_A:
        grad_a += tl.load(grad_a_ptr + at, mask=ok, other=0.0)
    tl.store(grad_x_ptr + at, grad_x, mask=ok)
    both = tl.interleave(grad_m, grad_a * triton_map.log_scale_slope(a, limit, epsilon, KIND))
    j = tl.program_id(0) % chunks * (2 * BLOCK_D) + tl.arange(0, 2 * BLOCK_D)
    tl.store(g_ptr + sample * 2 * features + j, both, mask=j < 2 * features)


@triton.jit
def _ladj_kernel(shares_ptr, ladj_ptr, n, count, BLOCK_B: tl.constexpr, OVERLAP: tl.constexpr):
    """The sum of the shares [count, n] of one sample."""
    overlap.wait(OVERLAP)
    sample = tl.program_id(0)
    total = tl.zeros([BLOCK_B], tl.float64)
    for start in range(0, count, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        total += tl.load(shares_ptr + b.to(tl.int64) * n + sample, mask=b < count, other=0.0)
    tl.store(ladj_ptr + sample, tl.sum(total, 0).to(tl.float32))


def shares_of(h: Tensor, features: int) -> int:
    """Returns how many shares of a sample's log-determinant ``forward_into`` writes."""
    return common.cdiv(2 * features, linear.shape_of(h, h.shape[0]).rows)


def forward(h: Tensor, x: Tensor, args: AffineArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z`` ``[N, D]``, ``ladj`` ``[N]`` and ``log_scale`` ``[N, D]``; the weight may be bfloat16 or bytes."""
    z, log_scale = torch.empty_like(x), torch.empty_like(x)
    shares = h.new_empty(shares_of(h, x.shape[1]), x.shape[0], dtype=torch.float64)
    forward_into(z, log_scale, shares, h, x, args)
    return z, ladj_of(shares), log_scale


def forward_into(z: Tensor, log_scale: Tensor, shares: Tensor, h: Tensor, x: Tensor, args: AffineArgs) -> None:
    """Writes ``z``, ``log_scale`` and the shares ``[shares_of, N]`` (float64) of the log-determinants."""
    (n, hidden), features = h.shape, x.shape[1]
    shape, affine_map = linear.shape_of(h, n, args.weight.dtype), args.affine_map
    panels = work_lists.on_device(args.panels, h.device)
    work = work_lists.forward(args.panels, h.device, shape.rows, shape.columns, 0)  # rows suffice: nothing is split
    common.launch(
        _affine_output_fwd_kernel,
        len(work.items) * common.cdiv(n, shape.samples),
        h, args.weight, args.bias, x, panels, work.items, z, log_scale, shares, affine_map.limit, affine_map.epsilon,
        n, hidden, features, args.weight_scale,
        **_modes(affine_map), PREFETCH=shape.prefetch, **shape.options,
    )  # fmt: skip


def ladj_of(shares: Tensor) -> Tensor:
    """Returns the sums of the shares ``[count, N]``."""
    count, n = shares.shape
    ladj = torch.empty(n, dtype=torch.float32, device=shares.device)
    block = common.power_of_two(count, 1, 4 * common.BLOCK)  # few rounds of loads, which wait for each other
    common.launch(_ladj_kernel, n, shares, ladj, n, count, BLOCK_B=block, num_warps=8 if block > common.BLOCK else 4)
    return ladj


def grad_product(batch: AffineBatch, args: AffineArgs) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the layer's product ``[N, 2D]`` and, through the transform alone, of ``x``; that of
    ``log_scale`` may be None, for zero.
    """
    grad_z, grad_ladj, grad_log_scale, _, z, log_scale, x = batch
    affine_map, (n, features) = args.affine_map, z.shape
    of = z if affine_map.form == SHIFT_FIRST else x.contiguous()
    g, grad_x = z.new_empty(n, 2 * features), torch.empty_like(z)
    grad_a = None if grad_log_scale is None else grad_log_scale.contiguous()
    common.launch(
        _affine_output_grad_kernel,
        n * common.cdiv(features, common.BLOCK // 2),
        grad_z.contiguous(), grad_ladj.contiguous(), grad_a, of, log_scale, g, grad_x, affine_map.limit,
        affine_map.epsilon, n, features,
        BLOCK_D=common.BLOCK // 2, **_modes(affine_map), GRAD_A=grad_a is not None,
    )  # fmt: skip
    return g, grad_x


def _modes(affine_map: AffineMap) -> dict[str, Any]:
    return {"SHIFT_FIRST": affine_map.form == SHIFT_FIRST, "KIND": triton_map.kind_of(affine_map)}


def backward(batch: AffineBatch, args: AffineArgs, need_inputs: bool, need_weight: bool) -> tuple[Tensor, ...]:
    """Returns the gradients of ``h``, the packed weight, the bias and ``x``; the first two empty when not needed."""
    g, grad_x = grad_product(batch, args)
    return *linear.backward(product_batch(g, batch), args.linear, need_inputs, need_weight), grad_x


def adam_(batch: AffineBatch, args: AffineArgs, need_inputs: bool, update: Update) -> tuple[Tensor, ...]:
    """Takes a step of Adam on the weight, in place; returns the gradients of ``h``, the bias and ``x``."""
    g, grad_x = grad_product(batch, args)
    return *linear.adam_(product_batch(g, batch), args.linear, need_inputs, update), grad_x


def squared_norm(batch: AffineBatch, args: AffineArgs) -> Tensor:
    """Returns the sum of the squares of the weight's gradient."""
    return linear.squared_norm(product_batch(grad_product(batch, args)[0], batch), args.linear)
