"""Device functions that the Triton kernels share, and how a kernel is launched."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmaf.kernels.triton_common import launch_table
from fastmaf.kernels.triton_common.launch_table import Table

# What a program of an elementwise kernel takes.
BLOCK = 1024


class Target(NamedTuple):
    """The card that a tensor is on: its launch table, multiprocessors, and the precision of matrix products there."""

    table: Table
    sms: int
    precision: str


def target(like: Tensor) -> Target:
    """Returns the card that ``like`` is on.

    Raises:
        ValueError: the card does not have the precision that was chosen.
    """
    capability, sms = _card(like.device)
    table = launch_table.TABLES[launch_table.family(capability)]
    return Target(table, sms, launch_table.precision(capability))


def _card(device: torch.device) -> tuple[int, int]:
    """Returns a card's compute capability, such as 61, and its multiprocessors."""
    if launch_table.recorded_card is not None:
        return launch_table.recorded_card
    # The interpreter has the oldest card's rules, and few programs.
    return _cuda_card(device) if device.type == "cuda" else (61, 2)


@functools.cache
def _cuda_card(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def why_not(like: Tensor) -> str | None:
    """Returns why the kernels cannot serve tensors like this one, or None when they can."""
    if like.dtype != torch.float32:
        return f"the triton kernels take float32 tensors; found {like.dtype}"
    if like.device.type == "cuda":
        if (capability := _card(like.device)[0]) < min(launch_table.TABLES):
            return f"the triton kernels need compute capability 6.1 or newer; this card has {capability / 10:.1f}"
    elif not launch_table.take_cpu_tensors():
        return (
            f"the triton kernels run on CUDA tensors; found one on {like.device} (TRITON_INTERPRET=1, set before "
            f"fastmaf is imported, interprets them on the CPU, for tests)"
        )
    return None


class Launched(NamedTuple):
    """A call of ``launch``."""

    kernel: Any
    grid: int
    args: tuple[Any, ...]
    options: dict[str, Any]


_launches: list[Launched] | None = None


@contextmanager
def recording(capability: int, sms: int) -> Iterator[list[Launched]]:
    """Lists the launches within a ``with`` block instead of making them: what would run on a card that is not here.

    Tensors may then be anywhere; results are whatever their memory holds. For compiling ahead of time.

    Args:
        capability: of the card, such as 61.
        sms: its multiprocessors.
    """
    global _launches
    _launches, launch_table.recorded_card = [], (capability, sms)
    try:
        yield _launches
    finally:
        _launches = launch_table.recorded_card = None


def launch(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
    """Launches ``grid`` programs of a kernel, if any, on the current stream of the first tensor's device."""
    options["enable_fp_fusion"] = True  # errors were measured with fused multiply-adds; Triton's default has changed
    if _launches is not None:
        _launches.append(Launched(kernel, grid, args, options))
    elif grid:
        with torch.cuda.device_of(args[0]):
            kernel[(grid,)](*args, **options)


def all_registers(warps: int) -> int:
    """Returns how many registers a thread can have in a program of so many warps: for ``maxnreg``, where the assembler,
    left to itself, would rather spill some so that more programs fit.
    """
    return min(255, 65_536 // (32 * warps))


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up, in less time than ``triton.cdiv``."""
    return -(-a // b)


def power_of_two(n: int, least: int, most: int) -> int:
    """Returns the smallest power of two that is at least ``n``, within ``least`` and ``most``, which are such."""
    return max(least, min(most, 1 << max(0, n - 1).bit_length()))


@triton.jit
def exponential(x):
    """Exponential, to about one unit in the last place: exp2 of x log2(e) alone would lose |x| of them."""
    x = tl.where(x > 120.0, 120.0, tl.where(x < -120.0, -120.0, x))  # beyond float32 on either side; NaN stays
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, tl.full(x.shape, -0.693359375, tl.float32), x)  # ln 2 in two parts, the first exact in 9 bits
    r = tl.fma(n, tl.full(x.shape, 2.12194440054690583e-4, tl.float32), r)
    half = tl.floor(n * 0.5)  # 2^n itself may be too large where the result is not
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(half) * tl.exp2(n - half)


@triton.jit
def hyperbolic_tangent(x):
    """Hyperbolic tangent: 1 - 2 / (e^2x + 1), and its continued fraction near zero, where that cancels."""
    size = tl.abs(x)
    far = 1.0 - tl.div_rn(tl.full(x.shape, 2.0, tl.float32), exponential(2.0 * tl.where(size > 10.0, 10.0, size)) + 1.0)
    # x / (1 + s / (3 + s / (5 + s / (7 + s / 9)))), s = x²: below 0.6 within 1e-9.
    s = x * x
    top = x * (945.0 + s * (105.0 + s))
    near = tl.div_rn(top, 945.0 + s * (420.0 + 15.0 * s))
    found = tl.where(size < 0.6, near, tl.where(x < 0, -far, far))
    return tl.where(x == x, found, x)


@triton.jit
def bounded(u, bound, SOFT: tl.constexpr):
    """The log-scale for the network's raw output; NaN stays NaN."""
    if SOFT:
        return bound * hyperbolic_tangent(tl.div_rn(u, tl.zeros_like(u) + bound))
    else:
        return tl.where(u > bound, bound, tl.where(u < -bound, -bound, u))


@triton.jit
def bound_slope(a, bound, SOFT: tl.constexpr):
    """The slope da/du as a function of the bounded value a."""
    if SOFT:
        share = tl.div_rn(a, tl.zeros_like(a) + bound)
        return 1.0 - share * share
    else:
        return tl.where(tl.abs(a) < bound, 1.0, 0.0)


@triton.jit
def matmul(a, b, acc, PRECISION: tl.constexpr):
    """The sum acc + a b, with float32 sums."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def weights(w_ptr, base, width, k, row_ok):
    """A tile of a packed weight ``[rows, k]``, zero outside it.

    That 16 bytes can be loaded at once must be known where base, width and the first k are loaded (``tl.multiple_of``):
    such a hint is lost on a function's argument.
    """
    mask = row_ok[:, None] & (k[None, :] < width[:, None])
    return tl.load(w_ptr + base[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rows_at(base_ptr, width_ptr, j, row_ok, ALIGNED: tl.constexpr):
    """Where rows j of a packed weight start, and how wide they are."""
    base = tl.load(base_ptr + j, mask=row_ok, other=0)
    width = tl.load(width_ptr + j, mask=row_ok, other=0)
    if ALIGNED:
        base = tl.multiple_of(base, 16)
        width = tl.multiple_of(width, 16)
    return base, width


@triton.jit
def product(
    x_ptr, sample, sample_ok, stride, w_ptr, base, width, row_ok, k_begin, k_end,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, LANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The product x Wᵀ over columns k_begin..k_end: ``[BLOCK_N samples, BLOCK_J rows]``.

    With LANES each thread adds up a few columns of its own, and threads are summed at the end. One layout, from load to
    sum: operands of other shapes would go through shared memory in every iteration.
    """
    if LANES and BLOCK_N == 1:
        x_row = x_ptr + tl.sum(sample.to(tl.int64), 0) * stride
        flat = tl.zeros([BLOCK_J, BLOCK_K], tl.float32)
        for start in range(k_begin, k_end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            w = weights(w_ptr, base, width, k, row_ok)
            flat += w * tl.load(x_row + k, mask=k < k_end, other=0.0)[None, :]
        return tl.sum(flat, 1)[None, :]
    elif LANES and BLOCK_N > 8:  # in one layout, the sums of more samples would spill on Pascal
        x_row = x_ptr + sample.to(tl.int64) * stride
        lanes = tl.zeros([BLOCK_N, BLOCK_J, BLOCK_K], tl.float32)
        for start in range(k_begin, k_end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            w = weights(w_ptr, base, width, k, row_ok)
            x = tl.load(x_row[:, None] + k[None, :], mask=sample_ok[:, None] & (k < k_end)[None, :], other=0.0)
            lanes += w[None, :, :] * x[:, None, :]
        return tl.sum(lanes, 2)
    elif LANES:
        lanes = tl.zeros([BLOCK_N, BLOCK_J, BLOCK_K], tl.float32)
        x_row = x_ptr + (sample.to(tl.int64) * stride)[:, None, None]
        w_row = w_ptr + base[None, :, None]
        w_ok = row_ok[None, :, None]
        for start in range(k_begin, k_end, BLOCK_K):
            k = (start + tl.arange(0, BLOCK_K))[None, None, :]
            w = tl.load(w_row + k, mask=w_ok & (k < width[None, :, None]), other=0.0).to(tl.float32)
            x = tl.load(x_row + k, mask=sample_ok[:, None, None] & (k < k_end), other=0.0)
            lanes += w * x
        return tl.sum(lanes, 2)
    else:
        x_row = x_ptr + sample.to(tl.int64) * stride
        acc = tl.zeros([BLOCK_N, BLOCK_J], tl.float32)
        for start in range(k_begin, k_end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            w = weights(w_ptr, base, width, k, row_ok)
            x = tl.load(x_row[:, None] + k[None, :], mask=sample_ok[:, None] & (k < k_end)[None, :], other=0.0)
            acc = matmul(x, tl.trans(w), acc, PRECISION)
        return acc


@triton.jit
def adam_scalars(ptr):
    """Loads ``AdamNumbers.kernel_scalars``: once for a program, as within a loop they would be loaded each time."""
    factor, l2, decay = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)
    rest1, beta2, rest2 = tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5)
    step_size, root, eps = tl.load(ptr + 6), tl.load(ptr + 7), tl.load(ptr + 8)
    return factor, l2, decay, rest1, beta2, rest2, step_size, root, eps


@triton.jit
def adam_at(
    w_ptr, exp_avg_ptr, exp_avg_sq_ptr, at, ok, w, g, factor, l2, decay, rest1, beta2, rest2, step_size, root, eps
):  # fmt: skip
    """One step of Adam on the weights w, which lie at ``at``, and on their moments."""
    m = tl.load(exp_avg_ptr + at, mask=ok, other=0.0)
    v = tl.load(exp_avg_sq_ptr + at, mask=ok, other=0.0)
    g = g * factor + l2 * w
    m += (g - m) * rest1
    v = v * beta2 + rest2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + root) + eps
    tl.store(w_ptr + at, w * decay - step_size * tl.div_rn(m, denominator), mask=ok)
    tl.store(exp_avg_ptr + at, m, mask=ok)
    tl.store(exp_avg_sq_ptr + at, v, mask=ok)
