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

from fastmaf.kernels.float8 import BYTE
from fastmaf.kernels.triton_common import launch_table, overlap
from fastmaf.kernels.triton_common.launch_table import Table

# What a program of an elementwise kernel takes.
BLOCK = 1024
# Types of packed weights, behind pointers that kernels load.
WEIGHT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, BYTE: tl.uint8}
# 2 to the difference of the biases of exponents, 127 of float32 and 7 of float8_e4m3fn.
_FLOAT8_FACTOR = tl.constexpr(2.0**120)
_FLOAT8_BITS = tl.constexpr(0x87F0_0000 - 2**32)  # of an int32: the sign, and 7 bits from the fourth on
_INTERPRETED = tl.constexpr(launch_table.take_cpu_tensors())  # which has no machine instructions


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
    """Launches ``grid`` programs of a kernel, if any, on the current stream of the first tensor's device; one with an
    argument OVERLAP before the last kernel has ended, where the card can (``overlap``).
    """
    options["enable_fp_fusion"] = True  # errors were measured with fused multiply-adds; Triton's default has changed
    if "OVERLAP" in kernel.arg_names:
        options["OVERLAP"] = _card(args[0].device)[0] in launch_table.EARLY and overlap.allowed()
        if options["OVERLAP"]:
            options["launch_pdl"] = True
    if _launches is not None:
        _launches.append(Launched(kernel, grid, args, options))
    elif grid:
        with torch.cuda.device_of(args[0]):
            kernel[(grid,)](*args, **options)


def all_registers(warps: int, programs: int = 1) -> int:
    """Returns how many registers a thread can have where so many programs of so many warps share a multiprocessor: for
    ``maxnreg``, where the assembler, left to itself, would rather spill some so that more programs fit.
    """
    return max(32, min(255, 65_536 // (32 * warps * programs) // 8 * 8))


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up, in less time than ``triton.cdiv``."""
    return -(-a // b)


def power_of_two(n: int, least: int, most: int) -> int:
    """Returns the smallest power of two that is at least ``n``, within ``least`` and ``most``, which are such."""
    return max(least, min(most, 1 << max(0, n - 1).bit_length()))


@triton.jit
def matmul(a, b, acc, PRECISION: tl.constexpr):
    """The sum acc + a b, with float32 sums.

    In full precision the product is summed by itself first. A long sum, to which one term after the other is added,
    loses many digits, and matrix units cut off what they do not keep.
    """
    if PRECISION == "tf32x3":
        a_high, b_high = tf32(a), tf32(b)
        sums = tl.dot(a - a_high, b_high, input_precision="tf32")
        sums = tl.dot(a_high, b - b_high, sums, input_precision="tf32")
        return acc + tl.dot(a_high, b_high, sums, input_precision="tf32")
    elif PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif PRECISION == "tf32":
        return tl.dot(a, b, acc, input_precision="tf32")
    else:  # a plain sum of the two would become one with the product
        return tl.fma(tl.dot(a, b, input_precision="ieee"), tl.full(acc.shape, 1.0, tl.float32), acc)


@triton.jit
def tf32(x):
    """Rounds to the 11 bits of TF32."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def fast_root(x):
    """The square root of normal numbers within a unit in the last place; subnormal ones are taken for zero.

    Triton's own has three more instructions for those.
    """
    if _INTERPRETED:
        return tl.sqrt(x)
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def fast_reciprocal(x):
    """1 / x within a unit in the last place, where neither is subnormal: those are taken for zero."""
    if _INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def forward_item(item):
    """Loads an item of ``work_lists.forward``: block of rows, first and end column, slot, and columns before."""
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
def as_float32(w):
    """Weights as float32. Bytes are those of float8_e4m3fn: sign, exponent and fraction are moved to their places, and
    the difference of the exponents' biases is multiplied away; exact on every card, with or without such conversions.
    """
    if w.dtype == tl.uint8:
        bits = (w.to(tl.int32) << 24 >> 4) & _FLOAT8_BITS
        return bits.to(tl.float32, bitcast=True) * _FLOAT8_FACTOR
    else:
        return w.to(tl.float32)


@triton.jit
def weights(w_ptr, base, width, k):
    """A tile ``[k, rows]`` of a packed weight, zero outside it; of bytes without the factor of their layer."""
    at = base[None, :] + (k * 16)[:, None]
    return as_float32(tl.load(w_ptr + at, mask=k[:, None] < width[None, :], other=0))


@triton.jit
def product(
    x_ptr, sample, sample_ok, stride, w_ptr, base, width, k_begin, k_end,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The product x Wᵀ over columns k_begin..k_end, by matrix products: ``[BLOCK_N samples, BLOCK_J rows]``."""
    x_row = x_ptr + sample.to(tl.int64) * stride
    acc = tl.zeros([BLOCK_N, BLOCK_J], tl.float32)
    for start in range(k_begin, k_end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = weights(w_ptr, base, width, k)
        x = tl.load(x_row[:, None] + k[None, :], mask=sample_ok[:, None] & (k < k_end)[None, :], other=0.0)
        acc = matmul(x, w, acc, PRECISION)
    return acc
