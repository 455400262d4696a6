"""Products of few samples without matrix units: each thread keeps sums over the weights that it loads.

A tile of weights has one layout, that of its loads of 16 bytes a thread, from load to sum or store: nothing goes
through shared memory within a loop. So that no other layout appears, each sample has tensors of its own in a tuple, and
a load of them has fewer numbers than the program has threads: the compiler then loads them as their use demands.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmaf.kernels.triton_common import device as common
from fastmaf.kernels.triton_common import overlap


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
def product(
    x_ptr, first, n, stride, w_ptr, start, k_begin, k_end, x_end,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, PREFETCH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The product x Wᵀ of a panel, whose column 0 is number ``start``, over columns k_begin..k_end.

    For the samples from ``first`` on: ``[BLOCK_N, 16]``, of which those beyond n have no meaning. Inputs are loaded up
    to column x_end, which is ``whole_vectors`` of k_end where those beyond it have been written. With OVERLAP the
    first PREFETCH columns have been asked for, and more are, so that always so many are on their way.
    """
    base = start.to(tl.int64) * 16 + tl.arange(0, 16)
    end = tl.zeros([16], tl.int32) + k_end
    sums = ()
    for _ in tl.static_range(BLOCK_N):
        sums = sums + (tl.zeros([BLOCK_K, 16], tl.float32),)  # type: ignore[assignment]
    # Of two tiles of float32 a thread has columns side by side, and loads both inputs at once. Fewer bits have so many
    # columns in a tile that the compiler would give their inputs a layout of their own.
    PAIR: tl.constexpr = 2 if TILES > 1 and w_ptr.dtype.element_ty == tl.float32 else 1
    for begin in range(k_begin, k_end, BLOCK_K * TILES):
        k = begin + tl.arange(0, BLOCK_K) * PAIR
        ahead = begin + PREFETCH
        overlap.prefetch(
            w_ptr, (start + ahead).to(tl.int64) * 16, tl.minimum(k_end - ahead, BLOCK_K * TILES) * 16, OVERLAP
        )  # fmt: skip
        tiles = ()
        for t in tl.static_range(TILES):  # all loads before the first use
            tiles = tiles + (common.weights(w_ptr, base, end, k + (t // PAIR * PAIR * BLOCK_K + t % PAIR)),)  # type: ignore[assignment]
        for t in tl.static_range(0, TILES, PAIR):
            columns = k + t * BLOCK_K
            if PAIR == 2:
                sums = _add_pairs(sums, tiles[t], tiles[t + 1], x_ptr, first, n, stride, columns, x_end, BLOCK_N)
            else:
                sums = _add_products(sums, tiles[t], x_ptr, first, n, stride, columns, columns < x_end, BLOCK_N)
    return tl.trans(tl.reshape(tl.sum(stacked(sums), 0), [16, BLOCK_N]))


@triton.jit
def _add_products(sums, w, x_ptr, first, n, stride, k, ok, BLOCK_N: tl.constexpr):
    added = ()
    for i in tl.static_range(BLOCK_N):
        row = x_ptr + tl.minimum(first + i, n - 1).to(tl.int64) * stride
        added = added + (sums[i] + w * tl.load(row + k, mask=ok, other=0.0)[:, None],)  # type: ignore[assignment]
    return added


@triton.jit
def _add_pairs(sums, w0, w1, x_ptr, first, n, stride, k, x_end, BLOCK_N: tl.constexpr):
    both = k[:, None] + tl.arange(0, 2)[None, :]
    added = ()
    for i in tl.static_range(BLOCK_N):
        row = x_ptr + tl.minimum(first + i, n - 1).to(tl.int64) * stride
        x0, x1 = tl.split(tl.load(row + both, mask=both < x_end, other=0.0))
        added = added + (sums[i] + w0 * x0[:, None] + w1 * x1[:, None],)  # type: ignore[assignment]
    return added


@triton.jit
def rows_of(ptr, n, stride, c, ok, COUNT: tl.constexpr):
    """Loads columns c of the first rows, each a tensor of its own; those from n on are zero."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (tl.load(ptr + (c + i * stride), mask=ok & (tl.zeros_like(c) + i < n), other=0.0),)  # type: ignore[assignment]
    return rows


@triton.jit
def add_dots(sums, w, g):
    """Adds w g to the sums of each sample; a thread adds up the four neighbours that it loads at once."""
    added = ()
    for i in tl.static_range(len(sums)):
        added = added + (sums[i] + tl.sum(tl.reshape(w * g[i][None, :], [w.shape[0], 4, 4]), 2),)
    return added


@triton.jit
def outer(x, g):
    """The sum of the products of each sample's inputs and gradients."""
    total = x[0][:, None] * g[0][None, :]
    for i in tl.static_range(1, len(x)):
        total += x[i][:, None] * g[i][None, :]
    return total


@triton.jit
def total(rows):
    """The sum of a tuple of tensors."""
    found = rows[0]
    for i in tl.static_range(1, len(rows)):
        found += rows[i]
    return found
