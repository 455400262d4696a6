"""Masked linear layer on packed storage, in plain torch: the truth that the other backends are held against.

    y[n, j] = act(b[j] + sum_{i < prefix[j]} W[j, i] x[n, i])        (MADE, Germain et al. 2015, eq. 8-9, with sorted
    units)

Each tile of the staircase is a dense matrix with zeros in its padding: one matmul per tile, no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaf.kernels.adam.op import adam_step_
from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.layout import tiles_of, zero_padding
from fastmaf.kernels.masked_linear.args import LinearArgs, LinearBatch


def forward(x: Tensor, args: LinearArgs) -> Tensor:
    """Returns ``y`` ``[N, out]`` for ``x`` ``[N, in]``."""
    y = x.new_empty(x.shape[0], args.bias.shape[0])
    weight = args.weight.to(x.dtype)  # stored in fewer bits, it is the same function of rounded weights
    for tile in tiles_of(args.panels):
        rows = slice(tile.row_start, tile.row_end)
        if tile.width:
            torch.addmm(args.bias[rows], x[:, : tile.width], tile.of(weight).t(), out=y[:, rows])
        else:
            y[:, rows] = args.bias[rows]
    return activate_(y, args.activation)


def backward(batch: LinearBatch, args: LinearArgs, need_inputs: bool, need_weight: bool) -> tuple[Tensor, ...]:
    """Returns the gradients of ``x``, the packed weight (zero in the padding) and the bias.

    Those of ``x`` and of the weight are empty when not needed.
    """
    x, grad = batch.x, grad_activation(batch.grad_y, batch.y, args.activation)
    grad_x = grad_input(grad, args.weight, args.panels, x.shape[1]) if need_inputs else x.new_empty(0)
    return grad_x, grad_weight(grad, x, args) if need_weight else x.new_empty(0), grad.sum(0)


def adam_(batch: LinearBatch, args: LinearArgs, need_inputs: bool, update: Update) -> tuple[Tensor, ...]:
    """Takes a step of Adam on the weight, in place; returns the gradients of ``x`` and the bias."""
    grad_x, grad, grad_bias = backward(batch, args, need_inputs, True)
    adam_step_(args.weight, grad.mul_(update.scale), update)
    return grad_x, grad_bias


def squared_norm(batch: LinearBatch, args: LinearArgs) -> Tensor:
    """Returns the sum of the squares of the weight's gradient."""
    return backward(batch, args, False, True)[1].double().square().sum()


def activate_(y: Tensor, activation: str) -> Tensor:
    """Applies the activation in place and returns ``y``."""
    return y.relu_() if activation == "relu" else y


def grad_activation(grad_y: Tensor, y: Tensor, activation: str) -> Tensor:
    """Returns the gradient before the activation, given the one after it and the activation's value ``y``."""
    return torch.where(y > 0, grad_y, 0) if activation == "relu" else grad_y


def grad_input(grad_y: Tensor, weight: Tensor, panels: Tensor, in_features: int) -> Tensor:
    """Returns ``grad_y @ W`` ``[N, in]``."""
    grad_x = grad_y.new_zeros(grad_y.shape[0], in_features)
    weight = weight.to(grad_y.dtype)
    for tile in tiles_of(tiles):
        if tile.width:
            grad_x[:, : tile.width].addmm_(grad_y[:, tile.row_start : tile.row_end], tile.of(weight))
    return grad_x


def grad_weight(grad_y: Tensor, x: Tensor, args: LinearArgs) -> Tensor:
    """Returns ``grad_yᵀ @ x`` ``[numel]`` in packed storage, with exact zeros in the padding."""
    grad = grad_y.new_empty(args.weight.shape[0])
    grad_y_t = grad_y.t().contiguous()  # each tile's rows are then one block: a quarter less time than strided ones
    for tile in tiles_of(args.panels):
        if tile.width:
            torch.mm(grad_y_t[tile.row_start : tile.row_end], x[:, : tile.width], out=tile.of(grad))
    return zero_padding(grad, args.prefix, args.panels)
