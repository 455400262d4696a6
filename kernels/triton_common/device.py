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


def all_registers(warps: int, programs: int = 1) -> int:
    """Returns how many registers a thread can have where so many programs of so many warps share a multiprocessor: for
    ``maxnreg``, where the assembler, left to itself, would rather spill some so that more programs fit.
    """
    return min(255, 65_536 // (32 * warps * programs) // 8 * 8)


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up, in less time than ``triton.cdiv``."""
    return -(-a // b)


def power_of_two(n: int, least: int, most: int) -> int:
    """Returns the smallest power of two that is at least ``n``, within ``least`` and ``most``, which are such."""
    return max(least, min(most, 1 << max(0, n - 1).bit_length()))


@triton.jit
def matmul(a, b, acc, PRECISION: tl.constexpr):
    """The sum acc + a b, with float32 sums."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def forward_item(item):
    """Loads an item of ``work_lists.forward``: block of rows, first and end column, slot, and where the block starts."""
    k_begin = tl.multiple_of(tl.load(item + 1), 16)
    return tl.load(item), k_begin, tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)


@triton.jit
def panels_of(panels_ptr, j, rows, BLOCK_J: tl.constexpr):
    """Where the weights of rows j lie in the panels of ``rows`` rows: the place of column 0, and how many columns.

    The first of the rows is a multiple of BLOCK_J or of 16: rows of one panel lie side by side, so that several are
    loaded at once. That must be stated here, where starts are loaded; on a function's argument such a hint is lost.
    """
    SAME: tl.constexpr = BLOCK_J if BLOCK_J < 16 else 16
    ok = j // 16 * 16 < rows
    start = tl.load(panels_ptr + j // 16, mask=ok, other=0)
    end = tl.load(panels_ptr + j // 16 + 1, mask=ok, other=0)
    start = tl.max_constancy(start, SAME)
    width = tl.max_constancy((end - start).to(tl.int32), SAME)
    return start * 16 + j % 16, width


@triton.jit
def whole_vectors(k_end, features):
    """The end of columns rounded up, so that a mask which ends there leaves vectors of inputs whole: the columns beyond
    are padding.
    """
    return tl.minimum((k_end + 15) // 16 * 16, features)


@triton.jit
def weights(w_ptr, base, width, k):
    """A tile ``[k, rows]`` of a packed weight, zero outside it."""
    at = base[None, :] + (k * 16)[:, None]
    return tl.load(w_ptr + at, mask=k[:, None] < width[None, :], other=0.0).to(tl.float32)


@triton.jit
def product(
    x_ptr, sample, sample_ok, stride, w_ptr, base, width, k_begin, k_end,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, LANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The product x Wᵀ over columns k_begin..k_end: ``[BLOCK_N samples, BLOCK_J rows]``.

    With LANES each thread adds up a few weights of its own, and threads are summed at the end. One layout, from load to
    sum: operands of other shapes would go through shared memory in every iteration.
    """
    if LANES and BLOCK_N == 1:
        x_row = x_ptr + tl.sum(sample.to(tl.int64), 0) * stride
        flat = tl.zeros([BLOCK_K, BLOCK_J], tl.float32)
        for start in range(k_begin, k_end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            w = weights(w_ptr, base, width, k)
            flat += w * tl.load(x_row + k, mask=k < k_end, other=0.0)[:, None]
        return tl.sum(flat, 0)[None, :]
    elif LANES and BLOCK_N > 8:  # in one layout, the sums of more samples would spill on Pascal
        x_row = x_ptr + sample.to(tl.int64) * stride
        lanes = tl.zeros([BLOCK_N, BLOCK_K, BLOCK_J], tl.float32)
        for start in range(k_begin, k_end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            w = weights(w_ptr, base, width, k)
            x = tl.load(x_row[:, None] + k[None, :], mask=sample_ok[:, None] & (k < k_end)[None, :], other=0.0)
            lanes += w[None, :, :] * x[:, :, None]
        return tl.sum(lanes, 1)
    elif LANES:
        lanes = tl.zeros([BLOCK_N, BLOCK_K, BLOCK_J], tl.float32)
        x_row = x_ptr + (sample.to(tl.int64) * stride)[:, None, None]
        w_row = w_ptr + base[None, None, :]
        for start in range(k_begin, k_end, BLOCK_K):
            k = (start + tl.arange(0, BLOCK_K))[None, :, None]
            w = tl.load(w_row + k * 16, mask=k < width[None, None, :], other=0.0).to(tl.float32)
            x = tl.load(x_row + k, mask=sample_ok[:, None, None] & (k < k_end), other=0.0)
            lanes += w * x
        return tl.sum(lanes, 1)
    else:
        x_row = x_ptr + sample.to(tl.int64) * stride
        # TF32 units want both operands contiguous along the columns, which the samples are: the weights come from
        # registers, as the left operand of the transposed product.
        TURNED: tl.constexpr = PRECISION == "off"
        acc = tl.zeros([BLOCK_J, BLOCK_N] if TURNED else [BLOCK_N, BLOCK_J], tl.float32)
        for start in range(k_begin, k_end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            w = weights(w_ptr, base, width, k)
            x = tl.load(x_row[:, None] + k[None, :], mask=sample_ok[:, None] & (k < k_end)[None, :], other=0.0)
            acc = matmul(tl.trans(w), tl.trans(x), acc, PRECISION) if TURNED else matmul(x, w, acc, PRECISION)
        return tl.trans(acc) if TURNED else acc


@triton.jit
def stacked(parts):
    """Stacks a tuple of 1, 2, 4, 8 or 16 tensors along a new last axis. A thread keeps the numbers that it has."""
    for _ in tl.static_range(4):
        if len(parts) > 1:
            pairs = ()
            for i in tl.static_range(len(parts) // 2):
                pairs = pairs + (tl.join(parts[i], parts[len(parts) // 2 + i]),)
            parts = pairs
    return parts[0]


@triton.jit
def few_products(
    x_ptr, first, n, stride, w_ptr, start, k_begin, k_end,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The product x Wᵀ of a panel, whose column 0 is number ``start``, over columns k_begin..k_end, for the samples from
    ``first`` on: ``[BLOCK_N, 16]``, of which those beyond n have no meaning.

    Each thread adds up the weights that it loads, and threads are summed at the end: nothing goes through shared memory
    before. So that no layout but that of the weights appears, each sample has tensors of its own, and a load of it
    fewer numbers than the program has threads: the compiler then loads them as their use demands.
    """
    base = start.to(tl.int64) * 16 + tl.arange(0, 16)
    end = tl.zeros([16], tl.int32) + k_end
    sums = ()
    for _ in tl.static_range(BLOCK_N):
        sums = sums + (tl.zeros([BLOCK_K, 16], tl.float32),)
    for begin in range(k_begin, k_end, BLOCK_K * TILES):
        tiles = ()
        for t in tl.static_range(TILES):  # all loads before the first use
            tiles = tiles + (weights(w_ptr, base, end, begin + t * BLOCK_K + tl.arange(0, BLOCK_K)),)
        for t in tl.static_range(TILES):
            k = begin + t * BLOCK_K + tl.arange(0, BLOCK_K)
            sums = _add_products(sums, tiles[t], x_ptr, first, n, stride, k, k < k_end, BLOCK_N)
    return tl.trans(tl.reshape(tl.sum(stacked(sums), 0), [16, BLOCK_N]))


@triton.jit
def _add_products(sums, w, x_ptr, first, n, stride, k, ok, BLOCK_N: tl.constexpr):
    added = ()
    for i in tl.static_range(BLOCK_N):
        row = x_ptr + tl.minimum(first + i, n - 1).to(tl.int64) * stride
        added = added + (sums[i] + w * tl.load(row + k, mask=ok, other=0.0)[:, None],)
    return added


@triton.jit
def adam_scalars(ptr):
    """Loads ``AdamNumbers.kernel_scalars``: once for a program, as within a loop they would be loaded each time."""
    factor, l2, decay = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)
    rest1, beta2, rest2 = tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5)
    step_size, root, eps = tl.load(ptr + 6), tl.load(ptr + 7), tl.load(ptr + 8)
    return factor, l2, decay, rest1, beta2, rest2, step_size, 1.0 / root, eps


@triton.jit
def adam(w, m, v, g, factor, l2, decay, rest1, beta2, rest2, step_size, per_root, eps):
    """One step of Adam on the weights w with moments m and v and gradient g: the three after it.

    Square root and quotient are the fast ones: two units in the last place of a step, which is far smaller than the
    weight. The exact ones would be half of the instructions of a backward pass. The fast root is zero below the normal
    numbers, so that it starts there.
    """
    g = g * factor + l2 * w
    m += (g - m) * rest1
    v = v * beta2 + rest2 * g * g
    denominator = tl.sqrt(tl.maximum(v, 1.2e-38)) * per_root + eps
    return w * decay - step_size * (m / denominator), m, v
