"""Gradients through the inverse of flows, by implicit differentiation: a transposed, level-scheduled triangular solve.

A block maps x to z = f(x, θ) with log-determinant ℓ(x, θ); its inverse gives x and -ℓ. For a loss L whose gradients
with respect to these two are g_x and g_ladj, with J = df/dx, lower triangular in the order of the block:

    dx = J⁻¹ (dz - f_θ dθ),    dL = g_x · dx - g_ladj (ℓ_x · dx + ℓ_θ dθ)

    w = J⁻ᵀ (g_x - g_ladj ℓ_x)                       the gradient of z
    dL/dθ = -(wᵀ f_θ + g_ladj ℓ_θ)                   the gradients of the parameters

So the gradients are those that the forward pass at x has for grad_z = -w and grad_ladj = -g_ladj, and w is what makes
its gradient of x be -g_x. Neither needs the steps of the inverse: x is known, one pass of the network recomputes its
units, and all that remains is a triangular system. With g[d] the gradient of x[d], complete once everything that
depends on x[d] is taken into account, s = exp(-a) or exp(a) the slope of the element-wise map (``AffineMap``), and
(m, u) the two rows of the output layer for d:

    w[d] = g[d] / s[d]
    z = (x - m) exp(-a):   grad_m = g             grad_u = (g (x - m) + g_ladj) da/du            SHIFT_FIRST
    z = exp(a) x + m:      grad_m = -g exp(-a)    grad_u = -(g x + g_ladj) da/du                 SCALE_FIRST

and from there through the layers as usual: what is finished in step s of the schedule affects later steps alone, so
the steps are taken from the last to the first.

They are taken in groups of 16 units of a hidden layer, or a few times as many where this is little work, as in a
blocked triangular solve. Let e be the gradients of the group's units of the last hidden layer. The layers of the group
take them back to its x, its outputs and once more to its units, which is an affine map e → e A + c with A strictly
triangular. A, [16, 16], is formed for each sample,

    e (I - A) = e' + c        e': what the later groups have added

is solved, and the group's gradients are added to all that was finished before it in large products. Nearly all of the
weights are read in these; the whole pass costs the arithmetic of about one backward pass, and keeps a few numbers per
dimension and unit, as a forward pass does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmaf.kernels.affine_output.affine_map import SHIFT_FIRST, AffineMap
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.float8 import decode
from fastmaf.kernels.flow.args import FlowArgs
from fastmaf.kernels.flow.saved import before_permutation
from fastmaf.kernels.flow.torch.plan import Rows
from fastmaf.kernels.flow.torch.transposed_groups import Group, groups_of
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.masked_linear import torch as linear
from fastmaf.kernels.masked_linear.args import LinearArgs, LinearBatch

_MOST = 512  # dimensions of a group whose part of A is formed at once


def inverse_backward(
    grad_x: Tensor, grad_ladj: Tensor, x: Tensor, args: FlowArgs, need_parameters: bool
) -> list[Tensor]:
    """Returns the gradients of ``z``, and if needed of each packed weight (zero in the padding) and of each bias.

    Args:
        grad_x, grad_ladj: ``[N, D]`` and ``[N]``, the gradients of what the inverse returned.
        x: ``[N, D]``, what it returned.
        args: the blocks in the order of inversion.
        need_parameters: whether more than the gradient of ``z`` is wanted.
    """
    grad_weights, grad_biases = list(args.weights), list(args.biases)
    grad, x = (before_permutation(t, args.permutations[-1]) for t in (grad_x, x))
    for b, layers in reversed(list(enumerate(args.layers_of_blocks()))):
        block = _Block(x, [args.hidden(i) for i in layers], args.schedules[b], args.map(b))
        grad = before_permutation(block.solve(grad, grad_ladj), args.permutations[b])
        if need_parameters:
            for i, (grad_weight, grad_bias) in zip(layers, block.grad_parameters(), strict=True):
                grad_weights[i], grad_biases[i] = grad_weight, grad_bias
        if b:  # its z is what the inverse of the block before it returned
            x = before_permutation(block.z(), args.permutations[b])
    return [grad, *grad_weights, *grad_biases] if need_parameters else [grad]


class _Block:
    """One block at its x: the values of a forward pass, then the gradients of all rows of its layers.

    Args:
        x: ``[N, D]``.
        layers: the hidden layers, then the output layer.
        schedule: the block's ``level_schedule``.
        affine_map: the element-wise map.
    """

    def __init__(self, x: Tensor, layers: Sequence[LinearArgs], schedule: Tensor, affine_map: AffineMap) -> None:
        self._layers = [*layers[:-1], layers[-1]._replace(activation="identity")]
        self._schedule, self._map = schedule, affine_map
        backend = implementation("masked_linear", x)
        self._values = [x]
        for layer in self._layers[:-1]:
            self._values.append(backend.forward(self._values[-1], layer))
        shift, raw = backend.forward(self._values[-1], self._layers[-1]).unflatten(1, (-1, 2)).unbind(2)
        self._shift, self._log_scale = shift, affine_map.log_scale(raw)

    def z(self) -> Tensor:
        """Returns the block's z."""
        return self._map.forward(self._values[0], self._shift, self._log_scale)

    def solve(self, grad_x: Tensor, grad_ladj: Tensor) -> Tensor:
        """Returns the gradient of ``z``."""
        x, affine_map = self._values[0], self._map
        slope, scale = affine_map.slope(self._log_scale), torch.exp(-affine_map.sign * self._log_scale)
        by_shift, by_raw = (1, x - self._shift) if affine_map.form == SHIFT_FIRST else (-scale, -x)
        # All is kept units x samples, so that whatever a group reads or writes is one contiguous block. The gradients
        # of the output layer's rows are `of_x` times those of x, plus `of_ladj` in every second.
        of_x = x.new_empty(*x.shape, 2)
        of_x[..., 0], of_x[..., 1] = by_shift, slope * by_raw
        self._of_x = of_x.permute(1, 2, 0).contiguous()
        self._of_ladj = (slope * (-affine_map.sign * grad_ladj[:, None])).t().contiguous()
        self._slopes = [
            linear.grad_activation(torch.ones_like(value), value, layer.activation).t().contiguous()
            for value, layer in zip(self._values[1:], self._layers, strict=False)
        ]
        self._weights = [decode(layer.weight, layer.weight_scale, x.dtype) for layer in self._layers]
        # Of all layers' rows, before the activation; zero for units that no output reads. What no group has come to yet
        # are still the gradients after it, and in the output layer the factors.
        self._grads = [*(torch.zeros_like(slopes) for slopes in self._slopes), self._of_x.flatten(0, 1)]
        self._below = [grad_x.t().clone(memory_format=torch.contiguous_format), *self._grads[:-1]]
        for group in reversed(groups_of([layer.panels for layer in self._layers], self._schedule, len(x))):
            self._solve_group(group)
        return self._below[0].t() * scale

    def _solve_group(self, group: Group) -> None:
        inside = [
            _widened(rows.matrix(weight, below), below)
            for rows, weight, below in zip(group.rows, self._weights, group.below, strict=True)
        ]
        units = self._below[-1][group.below[-1]].clone()
        if group.several:
            *_, of_outputs = self._back(None, group, inside)
            units = torch.addmm(units, inside[-1].t(), of_outputs)
            units = _solved(self._coupling(group, inside), units) if group.complete else units
        *of_layers, grad_x, of_outputs = self._back(units, group, inside)
        self._below[0][group.below[0]] = grad_x
        for k, grad in enumerate([*of_layers, of_outputs]):
            self._grads[k][group.rows[k].rows] = grad
            _add_ahead(self._below[k][: group.below[k].start], grad, self._weights[k], group.rows[k])

    def _back(self, units: Tensor | None, group: Group, inside: Sequence[Tensor]) -> list[Tensor]:
        """Returns, for gradients of the last hidden layer's units (None: zero), those of each hidden layer's rows, of x
        and of the output layer's rows.
        """
        result, grad = [], units
        for k in reversed(range(len(inside) - 1)):
            below = self._below[k][group.below[k]]
            if grad is None:
                grad = below
                continue
            rows = grad * self._slopes[k][group.below[k + 1]]
            result.append(rows)
            grad = torch.addmm(below, inside[k].t(), rows)
        assert grad is not None
        outputs = self._of_x[group.below[0]] * grad[:, None]
        outputs[:, 1] += self._of_ladj[group.below[0]]
        return [*reversed(result), grad, outputs.flatten(0, 1)]

    def _coupling(self, group: Group, inside: Sequence[Tensor]) -> Tensor:
        """Returns A ``[units, units, N]``: how much the gradient of a unit (first) adds to that of another (second)."""
        first, *others, output = inside
        outputs, of_x = output.unflatten(0, (-1, 2)), self._of_x[group.below[0]]
        result = of_x.new_zeros(len(first) * output.shape[1], of_x.shape[2])
        for dims in (slice(d, d + _MOST) for d in range(0, len(of_x), _MOST)):
            products = first[:, None, dims, None] * outputs[dims].permute(2, 0, 1)  # [rows, units, dims, 2]
            result.addmm_(products.flatten(0, 1).flatten(1), of_x[dims].flatten(0, 1))
        result = result.unflatten(0, (len(first), output.shape[1])) * self._slopes[0][group.below[1], None]
        for k, weight in enumerate(others, 1):
            product = (weight @ result.flatten(1)).unflatten(1, result.shape[1:])
            result = product * self._slopes[k][group.below[k + 1], None]
        return result

    def grad_parameters(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the gradients of each layer's packed weight and bias, after ``solve``."""
        backend = implementation("masked_linear", self._values[0])
        result = []
        for grads, value, layer in zip(self._grads, self._values, self._layers, strict=True):
            # They are those before the activation.
            grad = grads.t().contiguous()
            batch, args = LinearBatch(grad, value, grad), layer._replace(activation="identity")
            _, grad_weight, grad_bias = backend.backward(batch, args, False, True)
            result.append((grad_weight, grad_bias))
        return result


def _widened(matrix: Tensor, columns: slice) -> Tensor:
    """Returns a matrix with zeros for the columns that its panels do not have."""
    missing = columns.stop - columns.start - matrix.shape[1]
    return pad(matrix, (0, missing)) if missing else matrix


def _solved(coupling: Tensor, start: Tensor) -> Tensor:
    """Returns e ``[units, N]`` with ``e (I - A) = start`` for each sample's strictly lower triangular matrix."""
    dtype = torch.promote_types(start.dtype, torch.float32)  # LAPACK knows no shorter one
    system, right = -coupling.permute(2, 1, 0).to(dtype), start.t()[..., None].to(dtype)
    solution = torch.linalg.solve_triangular(system, right, upper=True, unitriangular=True)
    return solution[..., 0].t().to(start.dtype, memory_format=torch.contiguous_format)


def _add_ahead(grad_below: Tensor, grad_rows: Tensor, weight: Tensor, of: Rows) -> None:
    """Adds the gradients of what the rows of a group read that was finished before it, ``[units, N]``."""
    if not len(grad_below) or not len(grad_rows):
        return
    start, end = PANEL * of.runs[0].start, PANEL * of.runs[-1].end
    if (start, end) != (of.rows.start, of.rows.stop):
        grad_rows = pad(grad_rows, (0, 0, of.rows.start - start, end - of.rows.stop))
    for run in of.runs:
        matrix = run.of(weight)[:, : len(grad_below)].transpose(0, 1).flatten(1)
        grad_below[: len(matrix)].addmm_(matrix, grad_rows[PANEL * run.start - start : PANEL * run.end - start])
