"""Level-scheduled inverse in plain torch: the truth that the other backends are held against.

For each step of the schedule:

    (m, u) = b + W_out[rows of the step] h_last[units finished before]
    x[dims of the step] = z exp(a) + m,   a = bound(u)
    finish the hidden units that have become computable, layer by layer

Every weight is read once and every hidden unit is computed once, so the whole inverse costs the arithmetic of one
forward pass. It is exact for any weights and any strictly autoregressive degrees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.affine_output.torch import bound_log_scale, bound_slope
from fastmaf.kernels.flow.args import FlowArgs, permuted
from fastmaf.kernels.flow.saved import before_permutation
from fastmaf.kernels.layout import Tile, tiles_of
from fastmaf.kernels.masked_linear import torch as linear
from fastmaf.kernels.masked_linear.args import LinearArgs
from fastmaf.kernels.tensor_cache import cached


class _Piece(NamedTuple):
    """Rows of one layer that a step computes, all in one tile; they read the first ``width`` units below."""

    rows: int
    width: int
    stride: int
    offset: int

    def of(self, packed: Tensor) -> Tensor:
        """Returns these rows as a matrix ``[rows, width]`` that shares the memory of ``packed``."""
        return packed.as_strided((self.rows, self.width), (self.stride, 1), packed.storage_offset() + self.offset)


def _cut(
    starts: Sequence[int], ends: Sequence[int], finished: Sequence[int], tiles: Sequence[Tile]
) -> list[list[_Piece]]:
    """Cuts each step's rows where a tile ends; no piece reads further than what is finished below it."""
    result, tile = [], iter(tiles)
    current = next(tile)
    for start, end, below in zip(starts, ends, finished, strict=True):
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


def plan_of(panels: Sequence[Tensor], schedule: Tensor) -> list[list[list[_Piece]]]:
    """Returns, per step, the pieces of each layer: hidden layers first, the output layer last."""
    return cached(schedule, "plan", lambda: _make_plan([tiles_of(table) for table in tiles], schedule), also=tiles)


def _make_plan(layers: list[list[Tile]], schedule: Tensor) -> list[list[list[_Piece]]]:
    after = list(zip(*schedule.tolist(), strict=True))  # per step, of the dimensions, then of each hidden layer's units
    before = [(0, *counts[:-1]) for counts in after]
    cut = [_cut(before[k + 1], after[k + 1], after[k], layer) for k, layer in enumerate(layers[:-1])]
    cut.append(_cut([2 * d for d in before[0]], [2 * d for d in after[0]], before[-1], layers[-1]))
    return [list(pieces) for pieces in zip(*cut, strict=True)]


def inverse(z: Tensor, args: FlowArgs) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz|."""
    ladj = z.new_zeros(z.shape[0])
    for b in range(len(args.schedules)):
        z, term = _inverse_of_block(permuted(z, args.permutations[b]), args, b)
        ladj = ladj + term
    return permuted(z, args.permutations[-1]), ladj


@contextmanager
def _one_thread_if_small(z: Tensor) -> Iterator[None]:
    """Keeps small batches on one thread of the CPU.

    The products of a step are so small that a second thread costs more than it saves (5 samples of a flow of 12,288
    dimensions took 0.36 s on two threads, 0.24 s on one). From about 32 samples on it pays.
    """
    threads = torch.get_num_threads()
    if z.device.type != "cpu" or z.shape[0] > 16 or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _inverse_of_block(z: Tensor, args: FlowArgs, block: int) -> tuple[Tensor, Tensor]:
    layers = args.layers_of_blocks()[block]
    plan = plan_of([args.panels[i] for i in layers], args.schedules[block])
    # Stored in fewer bits, they are the same function of rounded weights.
    weights, biases = [args.weights[i].to(z.dtype) for i in layers], [args.biases[i] for i in layers]
    activation, bound, soft = args.activation, args.bounds[block], args.softs[block]
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
    with _one_thread_if_small(z):
        for *hidden_pieces, output_pieces in plan:
            for piece in output_pieces:
                out = torch.addmm(next(bias_of[-1]), piece.of(weights[-1]), hidden[-1].narrow(0, 0, piece.width))
                z_d, a, x_d = next(dim_of)
                a.copy_(bound_log_scale(out[1::2], bound, soft))
                torch.addcmul(out[0::2], z_d, torch.exp(a), out=x_d)
            for k, pieces in enumerate(hidden_pieces):
                for piece in pieces:
                    unit = next(unit_of[k])
                    below = below_of[k].narrow(0, 0, piece.width)
                    linear.activate_(torch.addmm(next(bias_of[k]), piece.of(weights[k]), below, out=unit), activation)
    return x_t.t().contiguous(), log_scale_t.sum(0)


def inverse_backward(grad_x: Tensor, grad_ladj: Tensor, z: Tensor, args: FlowArgs) -> list[Tensor]:
    """Returns the gradients of ``z``, of each packed weight (zero in the padding) and of each bias, in this order."""
    z_of_blocks = []
    for b in range(len(args.schedules)):
        z_of_blocks.append(permuted(z, args.permutations[b]))
        z, _ = _inverse_of_block(z_of_blocks[b], args, b)
    grad_weights, grad_biases = list(args.weights), list(args.biases)
    grad = before_permutation(grad_x, args.permutations[-1])
    for b, layers in reversed(list(enumerate(args.layers_of_blocks()))):
        grad, weights, biases = _backward_of_block(grad, grad_ladj, z_of_blocks[b], z, args, b)
        grad_weights[layers.start : layers.stop], grad_biases[layers.start : layers.stop] = weights, biases
        grad = before_permutation(grad, args.permutations[b])
        z = before_permutation(z_of_blocks[b], args.permutations[b])  # what the block before it has returned
    return [grad, *grad_weights, *grad_biases]


def _backward_of_block(
    grad_x: Tensor, grad_ladj: Tensor, z: Tensor, x: Tensor, args: FlowArgs, block: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns the gradients of ``z``, the weights and the biases of one block that maps ``z`` to ``x``.

    Walks the schedule backwards: when a step is reached, every value that depends on it has been differentiated.
    """
    *hidden, output = [
        LinearArgs(args.weights[i].to(z.dtype), *args.hidden(i)[1:]) for i in args.layers_of_blocks()[block]
    ]
    layers, last = [*hidden, output], len(hidden)
    bound, soft = args.bounds[block], args.softs[block]
    values = [x]  # x is known by now, so that one plain pass recomputes every unit
    for layer in hidden:
        values.append(linear.forward(values[-1], layer))
    out = linear.forward(values[last], output._replace(activation="identity"))
    a = bound_log_scale(out[:, 1::2], bound, soft)
    scale, slope = torch.exp(a), bound_slope(a, bound, soft)
    grad_values = [grad_x.clone(), *(torch.zeros_like(value) for value in values[1:])]
    grad_rows = [*(torch.zeros_like(value) for value in values[1:]), torch.zeros_like(out)]
    plan = plan_of([layer.panels for layer in layers], args.schedules[block])
    ends = [sum(piece.rows for step in plan for piece in step[k]) for k in range(len(layers))]
    for step in reversed(plan):
        for k in (*reversed(range(last)), last):  # the reverse of: outputs, then hidden layers from the first on
            for piece in reversed(step[k]):
                rows = slice(ends[k] - piece.rows, ends[k])
                ends[k] = rows.start
                if k < last:
                    grad = linear.grad_activation(grad_values[k + 1][:, rows], values[k + 1][:, rows], args.activation)
                else:
                    dims = slice(rows.start // 2, rows.stop // 2)
                    grad_shift = grad_values[0][:, dims]
                    grad_a = grad_shift * z[:, dims] * scale[:, dims] + grad_ladj[:, None]
                    grad = torch.stack((grad_shift, grad_a * slope[:, dims]), dim=2).flatten(1)
                grad_rows[k][:, rows] = grad
                grad_values[k][:, : piece.width] += grad @ piece.of(layers[k].weight)
    grad_weights = [linear.grad_weight(*of_layer) for of_layer in zip(grad_rows, values, layers, strict=True)]
    return grad_values[0] * scale, grad_weights, [grad.sum(0) for grad in grad_rows]
