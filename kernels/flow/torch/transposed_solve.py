"""The transposed, level-scheduled triangular solve: gradients through the inverse of an autoregressive block.

Of each dimension the inverse calculates x[d] and log dx[d]/dz[d] from z[d] and the outputs out[d] of the network, which
has seen the dimensions before it. For a loss L whose gradients with respect to x and ladj are g_x and g_ladj, let g[d]
be the gradient of x[d] once everything that depends on x[d] is taken into account. Then

    grad out[d] = g[d] · ∂x[d]/∂out[d] + g_ladj · ∂(log dx[d]/dz[d])/∂out[d]
    grad z[d]   = g[d] · ∂x[d]/∂z[d]   + g_ladj · ∂(log dx[d]/dz[d])/∂z[d]

and from the outputs through the layers as usual, down to the gradients of the dimensions before. Neither the factors
nor the units need the steps of the inverse: x is known, so that one pass of the network recomputes them. What remains
is a triangular system: what is finished in step s of the schedule affects later steps alone, so the steps are taken
from the last to the first.

They are taken in groups of 16 units of a hidden layer, or a few times as many where this is little work, as in a
blocked triangular solve. Let e be the gradients of the group's units of the last hidden layer. The layers of the group
take them back to its x, its outputs and once more to its units, which is an affine map e → e A + c with A strictly
triangular. A, [16, 16], is formed for each sample,

    e (I - A) = e' + c        e': what the later groups have added

is solved, and the group's gradients are added to all that was finished before it in large products. Nearly all of the
weights are read in these; the whole pass costs the arithmetic of about one backward pass, and keeps a few numbers per
dimension, output and unit, as a forward pass does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmaf.kernels.activations import ACTIVATIONS
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.float8 import decode
from fastmaf.kernels.flow.torch.network import Network
from fastmaf.kernels.flow.torch.plan import Rows
from fastmaf.kernels.flow.torch.transposed_groups import Group, groups_of
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.masked_linear.args import LinearBatch

_MOST = 512  # dimensions of a group whose part of A is formed at once


class TransposedSolve:
    """A block at its x: the values of a forward pass, then the gradients of all rows of its layers.

    Args:
        x: ``[N, D]``.
        network: the network.

    Attributes:
        out: the network's outputs ``[N, D, outputs]``.
    """

    def __init__(self, x: Tensor, network: Network) -> None:
        layers = [layer._replace(activation="identity") for layer in network.layers]
        self._network = network._replace(layers=layers)
        backend, terms = implementation("masked_linear", x), network.terms
        self._values, slopes, all_sums = [x], list[Tensor](), list[Tensor]()
        for k, layer in enumerate(layers):
            sums = backend.forward(self._values[-1], layer)
            sums = sums + terms[k] if terms else sums
            if k == len(layers) - 1:
                self.out = sums.unflatten(1, (x.shape[1], -1))
                break
            all_sums.append(sums + all_sums[k - 2] if network.adds_before(k) else sums)
            units, slope = _activated(all_sums[k], network.activations[k])
            self._values.append(units)
            slopes.append(slope.t().contiguous())
        self._slopes = slopes

    def solve(self, grad_x: Tensor, of_x: Tensor, of_ladj: Tensor) -> Tensor:
        """Returns the gradient g ``[N, D]`` of x with everything that depends on it.

        Args:
            grad_x: ``[N, D]``, the gradient of what the inverse returned.
            of_x: ``[N, D, outputs]``, the derivatives of x by the outputs.
            of_ladj: ``[N, D, outputs]``, those of log dx/dz, times the gradient of the log-determinant.
        """
        # All is kept units x samples, so that whatever a group reads or writes is one contiguous block.
        self._of_x, self._of_ladj = (factor.permute(1, 2, 0).contiguous() for factor in (of_x, of_ladj))
        x, layers = self._values[0], self._network.layers
        self._weights = [decode(layer.weight, layer.weight_scale, x.dtype) for layer in layers]
        # Of all layers' rows, before the activation; zero for units that no output reads. What no group has come to yet
        # are still the gradients after it, and in the output layer the factors.
        self._grads = [*(torch.zeros_like(slopes) for slopes in self._slopes), self._of_x.flatten(0, 1)]
        self._below = [grad_x.t().clone(memory_format=torch.contiguous_format), *self._grads[:-1]]
        for group in reversed(groups_of(self._network, len(x))):
            self._solve_group(group)
        return self._below[0].t()

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
        result: list[Tensor] = []  # of the last hidden layer first
        grad, last = units, len(inside) - 2
        for k in range(last, -1, -1):
            below = self._below[k][group.below[k]]
            if grad is None:  # only of the last hidden layer
                grad = below
                continue
            rows = grad * self._slopes[k][group.below[k + 1]]
            if k < last - 1 and self._network.adds_before(k + 2) and len(result) > 1:
                rows = rows + result[-2]
            result.append(rows)
            grad = torch.addmm(below, inside[k].t(), rows)
        assert grad is not None
        outputs = torch.addcmul(self._of_ladj[group.below[0]], self._of_x[group.below[0]], grad[:, None])
        return [*reversed(result), grad, outputs.flatten(0, 1)]

    def _coupling(self, group: Group, inside: Sequence[Tensor]) -> Tensor:
        """Returns A ``[units, units, N]``: how much the gradient of a unit (first) adds to that of another (second)."""
        first, *others, output = inside
        of_x = self._of_x[group.below[0]]
        outputs = output.unflatten(0, (len(of_x), -1))
        rows = of_x.new_zeros(len(first) * output.shape[1], of_x.shape[2])
        for dims in (slice(d, d + _MOST) for d in range(0, len(of_x), _MOST)):
            products = first[:, None, dims, None] * outputs[dims].permute(2, 0, 1)  # [rows, units, dims, outputs]
            rows.addmm_(products.flatten(0, 1).flatten(1), of_x[dims].flatten(0, 1))
        # How much the gradients of each layer's rows add.
        of_layers = [rows.unflatten(0, (len(first), output.shape[1]))]
        for k, weight in enumerate(others, 1):
            of_units = of_layers[-1] * self._slopes[k - 1][group.below[k], None]
            rows = (weight @ of_units.flatten(1)).unflatten(1, of_units.shape[1:])
            of_layers.append(rows + of_layers[k - 2] if self._network.adds_before(k) else rows)
        return of_layers[-1] * self._slopes[-1][group.below[-1], None]

    def grad_parameters(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the gradients of each layer's packed weight and bias, after ``solve``."""
        backend = implementation("masked_linear", self._values[0])
        result = []
        for grad, value, layer in zip(self.grad_terms(), self._values, self._network.layers, strict=True):
            _, grad_weight, grad_bias = backend.backward(LinearBatch(grad, value, grad), layer, False, True)
            result.append((grad_weight, grad_bias))
        return result

    def grad_terms(self) -> list[Tensor]:
        """Returns the gradients of each layer's sums ``[N, units]``, after ``solve``."""
        return [grads.t().contiguous() for grads in self._grads]


def _activated(sums: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Returns the units, and their derivatives."""
    if activation == "identity":
        return sums, torch.ones_like(sums)
    if activation == "relu":
        return sums.relu(), (sums > 0).to(sums.dtype)
    with torch.enable_grad():
        sums = sums.detach().requires_grad_()
        units = ACTIVATIONS[activation](sums)
        [slopes] = torch.autograd.grad(units, sums, torch.ones_like(units))
    return units.detach(), slopes


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
