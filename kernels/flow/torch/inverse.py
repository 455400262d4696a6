"""Level-scheduled inverse of flows in plain torch, and its gradients: the truth that the other backends are held
against.

A step's outputs (m, u) give x = z exp(a) + m with a = log_scale(u), or (z - m) exp(-a): see ``AffineMap``. The steps
are in ``solve.py``.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmaf.kernels.affine_output.affine_map import SHIFT_FIRST
from fastmaf.kernels.float8 import decode
from fastmaf.kernels.flow.args import FlowArgs, permuted
from fastmaf.kernels.flow.saved import before_permutation
from fastmaf.kernels.flow.torch.plan import Rows, plan_of
from fastmaf.kernels.flow.torch.solve import Network, solve
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.masked_linear import torch as linear


def inverse(z: Tensor, args: FlowArgs) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz|."""
    ladj = z.new_zeros(z.shape[0])
    for b in range(len(args.schedules)):
        z, term = _inverse_of_block(permuted(z, args.permutations[b]), args, b)
        ladj = ladj + term
    return permuted(z, args.permutations[-1]), ladj


def _inverse_of_block(z: Tensor, args: FlowArgs, block: int) -> tuple[Tensor, Tensor]:
    if any(bias.dtype != z.dtype for bias in args.biases):
        raise TypeError(f"expected z of dtype {args.biases[0].dtype}, as the biases are; found {z.dtype}")
    affine_map = args.map(block)

    def invert(z: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = out.unbind(-1)
        a = affine_map.log_scale(raw)
        return affine_map.inverse(z, shift, a), -affine_map.sign * a

    layers = [args.hidden(i) for i in args.layers_of_blocks()[block]]
    return solve(z, Network(layers, args.schedules[block], [args.activation] * (len(layers) - 1)), invert)


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
