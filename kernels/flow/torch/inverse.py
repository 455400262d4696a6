"""Level-scheduled inverse in plain torch: the truth that the other backends are held against.

For each step of the schedule:

    (m, u) = b + W_out[rows of the step] h_last[units finished before]
    x[dims of the step] = z exp(a) + m,   a = log_scale(u)             or (z - m) exp(-a): see ``AffineMap``
    finish the hidden units that have become computable, layer by layer

in groups of steps, as ``schedule.py`` describes. Every weight is read about once and every hidden unit is computed
once, so the whole inverse costs the arithmetic of one forward pass. It is exact for any weights and any strictly
autoregressive degrees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmaf.kernels.affine_output.affine_map import SHIFT_FIRST
from fastmaf.kernels.float8 import decode
from fastmaf.kernels.flow.args import FlowArgs, permuted
from fastmaf.kernels.flow.saved import before_permutation
from fastmaf.kernels.flow.torch.plan import Rows, plan_of
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.masked_linear import torch as linear


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
    if any(bias.dtype != z.dtype for bias in args.biases):
        raise TypeError(f"expected z of dtype {args.biases[0].dtype}, as the biases are; found {z.dtype}")
    layers, affine_map = args.layers_of_blocks()[block], args.map(block)
    plan = plan_of([args.panels[i] for i in layers], args.schedules[block])
    # Stored in fewer bits, they are the same function of rounded weights.
    weights = [decode(args.weights[i], args.weight_scales[i], z.dtype) for i in layers]
    biases = [args.biases[i] for i in layers]
    # Everything is kept units x samples, so that whatever a step reads or writes is one contiguous block, and is split
    # into the blocks of all steps beforehand: per-step slicing would cost more than the arithmetic.
    z_t = z.t().contiguous()
    x_t, log_scales = torch.empty_like(z_t), []
    below = [x_t, *(z.new_empty(bias.shape[0], z.shape[0]) for bias in biases[:-1])]
    dims = [count // 2 for of_layers in plan for count in of_layers[-1].counts]
    dim_of = zip(z_t.split(dims), x_t.split(dims), strict=True)
    last = len(layers) - 1
    with _one_thread_if_small(z):
        for of_layers in plan:
            solves: list[_Solve] = []
            for step in range(len(of_layers[0].counts)):
                for k in (last, *range(last)):
                    if step == 0:
                        rows = of_layers[k].rows
                        sums = z.new_empty(rows.stop - rows.start, z.shape[0]) if k == last else below[k + 1][rows]
                        solves.append(_Solve(sums, weights[k], biases[k], of_layers[k], below[k]))
                    if k == last:
                        out, (z_d, x_d) = solves[0].step(step), next(dim_of)
                        log_scales.append(affine_map.log_scale(out[1::2]))
                        x_d.copy_(affine_map.inverse(z_d, out[0::2], log_scales[-1]))
                    elif of_layers[k].counts[step]:
                        linear.activate_(solves[k + 1].step(step), args.activation)
    return x_t.t().contiguous(), torch.cat(log_scales).sum(0).mul_(-affine_map.sign)


class _Solve:
    """The products of one layer in a group of steps.

    Args:
        sums: ``[rows, N]``, where they are written to.
        weight, bias: of the layer.
        of: its rows.
        below: ``[units, N]``, the layer below, as far as it is finished.
    """

    def __init__(self, sums: Tensor, weight: Tensor, bias: Tensor, of: Rows, below: Tensor) -> None:
        self.of, self.below = of, below
        self._ahead(sums.copy_(bias[of.rows, None]), weight)
        self.sums = sums.split(of.counts)
        if len(of.counts) > 1:
            self.weights = of.matrix(weight, slice(of.below[0], of.below[-1])).split(of.counts)

    def _ahead(self, sums: Tensor, weight: Tensor) -> None:
        finished, rows = self.below[: self.of.below[0]].t(), self.of.rows
        for run in self.of.runs:
            panels = run.of(weight)[:, : finished.shape[1]]
            seen = finished[:, : panels.shape[1]].expand(len(panels), -1, -1)
            product = torch.bmm(seen, panels).mT.flatten(0, 1)
            start, stop = max(PANEL * run.start, rows.start), min(PANEL * run.end, rows.stop)
            sums[start - rows.start : stop - rows.start] += product[start - PANEL * run.start :][: stop - start]

    def step(self, step: int) -> Tensor:
        """Returns the finished sums of a step ``[rows, N]``."""
        sums, start = self.sums[step], self.of.below[0]
        if step:
            weight = self.weights[step]
            columns = min(self.of.below[step] - start, weight.shape[1])
            sums.addmm_(weight.narrow(1, 0, columns), self.below.narrow(0, start, columns))
        return sums


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
    of_block = [args.hidden(i) for i in args.layers_of_blocks()[block]]
    *hidden, output = [layer._replace(weight=decode(layer.weight, layer.weight_scale, z.dtype)) for layer in of_block]
    layers, last = [*hidden, output], len(hidden)
    affine_map = args.map(block)
    values = [x]  # x is known by now, so that one plain pass recomputes every unit
    for layer in hidden:
        values.append(linear.forward(values[-1], layer))
    out = linear.forward(values[last], output._replace(activation="identity"))
    a = affine_map.log_scale(out[:, 1::2])
    scale, slope = torch.exp(-affine_map.sign * a), affine_map.slope(a)
    grad_values = [grad_x.clone(), *(torch.zeros_like(value) for value in values[1:])]
    grad_rows = [*(torch.zeros_like(value) for value in values[1:]), torch.zeros_like(out)]

    def grad_of(k: int, rows: slice) -> Tensor:
        if k < last:
            return linear.grad_activation(grad_values[k + 1][:, rows], values[k + 1][:, rows], args.activation)
        dims = slice(rows.start // 2, rows.stop // 2)
        grad = grad_values[0][:, dims]
        if affine_map.form == SHIFT_FIRST:
            grad_m, grad_a = grad, grad * z[:, dims] * scale[:, dims] + grad_ladj[:, None]
        else:
            grad_m, grad_a = -grad * scale[:, dims], -grad * x[:, dims] - grad_ladj[:, None]
        return torch.stack((grad_m, grad_a * slope[:, dims]), dim=2).flatten(1)

    for of_layers in reversed(plan_of([layer.panels for layer in layers], args.schedules[block])):
        inside = [
            of.matrix(layer.weight, slice(of.below[0], of.below[-1])).split(of.counts)
            for of, layer in zip(of_layers, layers, strict=True)
        ]
        ends = [list(accumulate(of.counts, initial=of.rows.start)) for of in of_layers]
        for step in reversed(range(len(of_layers[0].counts))):
            for k in (*reversed(range(last)), last):  # the reverse of: outputs, then hidden layers from the first on
                of, rows = of_layers[k], slice(*ends[k][step : step + 2])
                grad_rows[k][:, rows] = grad = grad_of(k, rows)
                if step == 0:
                    _add_ahead(grad_values[k][:, : of.below[0]], grad_rows[k], layers[k].weight, of)
                elif of.counts[step]:
                    weight = inside[k][step]
                    columns = min(of.below[step] - of.below[0], weight.shape[1])
                    grad_values[k].narrow(1, of.below[0], columns).addmm_(grad, weight.narrow(1, 0, columns))
    grad_weights = [linear.grad_weight(*of_layer) for of_layer in zip(grad_rows, values, layers, strict=True)]
    return grad_values[0] * scale, grad_weights, [grad.sum(0) for grad in grad_rows]


def _add_ahead(grad_below: Tensor, grad_rows: Tensor, weight: Tensor, of: Rows) -> None:
    """Adds the gradients of what the rows of a group read that was finished before it."""
    start, end = PANEL * of.runs[0].start, PANEL * of.runs[-1].end
    grad = pad(grad_rows[:, of.rows], (of.rows.start - start, end - of.rows.stop))
    for run in of.runs:
        matrix = run.of(weight)[:, : grad_below.shape[1]].transpose(0, 1).flatten(1)
        grad_below[:, : len(matrix)].addmm_(grad[:, PANEL * run.start - start : PANEL * run.end - start], matrix.t())
