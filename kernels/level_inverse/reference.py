"""Level-scheduled inverse in plain torch: the truth that the other backends are held against.

For each step of the schedule:

    (m, u) = b + W_out[rows of the step] h_last[units finished before]
    x[dims of the step] = z exp(a) + m,   a = bound(u)
    finish the hidden units that have become computable, layer by layer

Every weight is read once and every hidden unit is computed once, so the whole inverse costs the arithmetic of one
forward pass. It is exact for any weights and any strictly autoregressive degrees. Activations are relu.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.affine_output.reference import bound_log_scale
from fastmaf.kernels.layout import Tile, unflatten, zero_padding
from fastmaf.kernels.level_inverse.schedule import steps


class _Piece(NamedTuple):
    """Rows of one layer that a step computes, all in one tile; they read the first ``width`` units below."""

    rows: int
    width: int
    stride: int
    offset: int

    def of(self, packed: Tensor) -> Tensor:
        """Returns these rows as a matrix ``[rows, width]`` that shares the memory of ``packed``."""
        return packed.as_strided((self.rows, self.width), (self.stride, 1), packed.storage_offset() + self.offset)


def _cut(spans: Sequence[tuple[int, int]], finished: Sequence[int], tiles: Sequence[Tile]) -> list[list[_Piece]]:
    """Cuts each step's span of rows where a tile ends; no piece reads further than what is finished below it."""
    result, tile = [], iter(tiles)
    current = next(tile)
    for (start, end), below in zip(spans, finished, strict=True):
        pieces = []
        while start < end:
            while current.row_end <= start:
                current = next(tile)
            stop = min(end, current.row_end)
            offset = current.offset + (start - current.row_start) * current.width
            pieces.append(_Piece(stop - start, min(current.width, below), current.width, offset))
            start = stop
        result.append(pieces)
    return result


@functools.lru_cache(maxsize=64)
def _plan(tiles: tuple[int, ...], tile_counts: tuple[int, ...], schedule: tuple[int, ...]) -> list[list[list[_Piece]]]:
    """Returns, per step, the pieces of each layer: hidden layers first, the output layer last."""
    layers = [list(unflatten(layer)) for layer in _split_tiles(tiles, tile_counts)]
    in_steps = steps(schedule, len(layers) - 1)
    cut = []
    for k, layer in enumerate(layers[:-1]):
        below = [step.dims[1] if k == 0 else step.units[k - 1][1] for step in in_steps]
        cut.append(_cut([step.units[k] for step in in_steps], below, layer))
    output_rows = [(2 * step.dims[0], 2 * step.dims[1]) for step in in_steps]
    cut.append(_cut(output_rows, [step.units[-1][0] for step in in_steps], layers[-1]))
    return [list(pieces) for pieces in zip(*cut, strict=True)]


def _split_tiles(tiles: Sequence[int], tile_counts: Sequence[int]) -> list[Sequence[int]]:
    result, start = [], 0
    for count in tile_counts:
        result.append(tiles[start : start + 4 * count])
        start += 4 * count
    return result


def forward(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    prefixes: Sequence[Tensor],
    tiles: Sequence[int],
    tile_counts: Sequence[int],
    schedule: Sequence[int],
    bound: float,
    soft: bool,
) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz|."""
    plan = _plan(tuple(tiles), tuple(tile_counts), tuple(schedule))
    # Everything is kept units x samples, so that whatever a step reads or writes is one contiguous block, and is split
    # into the blocks of all steps beforehand: per-step slicing would cost more than the arithmetic.
    z_t = z.t().contiguous()
    x_t, log_scale_t = torch.empty_like(z_t), torch.empty_like(z_t)
    hidden = [z.new_empty(bias.shape[0], z.shape[0]) for bias in biases[:-1]]
    below_of = [x_t, *hidden]
    rows = [[piece.rows for step in plan for piece in step[k]] for k in range(len(biases))]
    bias_of = [iter(b[: sum(r), None].split(r)) for b, r in zip(biases, rows, strict=True)]
    unit_of = [iter(h[: sum(r)].split(r)) for h, r in zip(hidden, rows, strict=False)]
    dims = [r // 2 for r in rows[-1]]
    dim_of = zip(z_t.split(dims), log_scale_t.split(dims), x_t.split(dims), strict=True)
    for *hidden_pieces, output_pieces in plan:
        for piece in output_pieces:
            out = torch.addmm(next(bias_of[-1]), piece.of(weights[-1]), hidden[-1].narrow(0, 0, piece.width))
            z_d, a, x_d = next(dim_of)
            a.copy_(bound_log_scale(out[1::2], bound, soft))
            torch.addcmul(out[0::2], z_d, torch.exp(a), out=x_d)
        for k, pieces in enumerate(hidden_pieces):
            for piece in pieces:
                unit = next(unit_of[k])
                torch.addmm(
                    next(bias_of[k]), piece.of(weights[k]), below_of[k].narrow(0, 0, piece.width), out=unit
                ).relu_()
    return x_t.t().contiguous(), log_scale_t.sum(0)


def _differentiable(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    prefixes: Sequence[Tensor],
    tiles: Sequence[int],
    tile_counts: Sequence[int],
    schedule: Sequence[int],
    bound: float,
    soft: bool,
) -> tuple[Tensor, Tensor]:
    """The same as ``forward`` without a write in place: autograd can run through it, at the price of copies per
    step.
    """
    plan = _plan(tuple(tiles), tuple(tile_counts), tuple(schedule))
    x, log_scale = z[:, :0], z[:, :0]
    hidden = [z[:, :0] for _ in biases[:-1]]
    for *hidden_pieces, output_pieces in plan:
        last = hidden[-1]
        for piece in output_pieces:
            d = x.shape[1]
            out = last[:, : piece.width] @ piece.of(weights[-1]).t() + biases[-1][2 * d : 2 * d + piece.rows]
            a = bound_log_scale(out[:, 1::2], bound, soft)
            x = torch.cat((x, out[:, 0::2] + z[:, d : d + piece.rows // 2] * torch.exp(a)), dim=1)
            log_scale = torch.cat((log_scale, a), dim=1)
        below = x
        for k, pieces in enumerate(hidden_pieces):
            for piece in pieces:
                u = hidden[k].shape[1]
                unit = torch.relu(below[:, : piece.width] @ piece.of(weights[k]).t() + biases[k][u : u + piece.rows])
                hidden[k] = torch.cat((hidden[k], unit), dim=1)
            below = hidden[k]
    return x, log_scale.sum(1)


def backward(
    grad_x: Tensor,
    grad_ladj: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    prefixes: Sequence[Tensor],
    tiles: Sequence[int],
    tile_counts: Sequence[int],
    schedule: Sequence[int],
    bound: float,
    soft: bool,
) -> list[Tensor]:
    """Returns the gradients of ``z``, of each packed weight (zero in the padding) and of each bias, in this order.

    Recomputes the inverse with autograd: meant for small sizes, where one trains through samples.
    """
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (z, *weights, *biases)]
        k = len(weights)
        x, ladj = _differentiable(
            leaves[0], leaves[1 : 1 + k], leaves[1 + k :], prefixes, tiles, tile_counts, schedule, bound, soft
        )
        grads = torch.autograd.grad((x, ladj), leaves, (grad_x, grad_ladj), allow_unused=True)
    result = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
    for grad, prefix, flat in zip(result[1 : 1 + k], prefixes, _split_tiles(tiles, tile_counts), strict=True):
        zero_padding(grad, prefix, flat)
    return result
