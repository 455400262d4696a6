"""Masked linear layer on packed storage, in plain torch: the truth that the other backends are held against.

    y[n, j] = act(b[j] + sum_{i < prefix[j]} W[j, i] x[n, i])        (MADE, Germain et al. 2015, eq. 8-9, with sorted
    units)

Each tile of the staircase is a dense matrix with zeros in its padding: one matmul per tile, no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaf.kernels.adam import adam_step_
from fastmaf.kernels.factors import Update
from fastmaf.kernels.layout import tiles_of, zero_padding


def forward(x: Tensor, weight: Tensor, bias: Tensor, prefix: Tensor, tiles: Tensor, activation: str) -> Tensor:
    """Returns ``y`` ``[N, out]`` for ``x`` ``[N, in]``, packed ``weight`` and ``bias`` ``[out]``."""
    y = x.new_empty(x.shape[0], bias.shape[0])
    weight = weight.to(x.dtype)  # stored in fewer bits, it is the same function of rounded weights
    for tile in tiles_of(tiles):
        rows = slice(tile.row_start, tile.row_end)
        if tile.width:
            torch.addmm(bias[rows], x[:, : tile.width], tile.of(weight).t(), out=y[:, rows])
        else:
            y[:, rows] = bias[rows]
    return activate_(y, activation)


def backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    activation: str,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of ``x`` (empty when not needed), packed ``weight`` (zero in the padding) and ``bias``."""
    grad_x, grad_bias = grad_inputs(grad_y, x, y, weight, prefix, tiles, activation, need_grad_x)
    return grad_x, grad_weight_of(grad_y, x, y, weight, prefix, tiles, activation), grad_bias


def grad_inputs(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    activation: str,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of ``x`` (empty when not needed) and ``bias``."""
    grad = grad_activation(grad_y, y, activation)
    grad_x = grad_input(grad, weight, tiles, x.shape[1]) if need_grad_x else x.new_empty(0)
    return grad_x, grad.sum(0)


def grad_weight_of(
    grad_y: Tensor, x: Tensor, y: Tensor, weight: Tensor, prefix: Tensor, tiles: Tensor, activation: str
) -> Tensor:
    """Returns the gradient of the packed ``weight``, zero in the padding."""
    return grad_weight(grad_activation(grad_y, y, activation), x, prefix, tiles, weight.shape[0])


def adam_(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    activation: str,
    need_grad_x: bool,
    update: Update,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Takes a step of Adam with ``scale`` times the gradient of ``weight``; returns what ``grad_inputs`` does."""
    result = grad_inputs(grad_y, x, y, weight, prefix, tiles, activation, need_grad_x)
    grad = grad_weight_of(grad_y, x, y, weight, prefix, tiles, activation)
    adam_step_(weight, grad.mul_(scale), update)
    return result


def squared_norm(
    grad_y: Tensor, x: Tensor, y: Tensor, weight: Tensor, prefix: Tensor, tiles: Tensor, activation: str
) -> Tensor:
    """Returns the sum of the squares of the gradient of ``weight``."""
    return grad_weight_of(grad_y, x, y, weight, prefix, tiles, activation).double().square().sum()


def activate_(y: Tensor, activation: str) -> Tensor:
    """Applies the activation in place and returns ``y``."""
    return y.relu_() if activation == "relu" else y


def grad_activation(grad_y: Tensor, y: Tensor, activation: str) -> Tensor:
    """Returns the gradient before the activation, given the one after it and the activation's value ``y``."""
    return torch.where(y > 0, grad_y, 0) if activation == "relu" else grad_y


def grad_input(grad_y: Tensor, weight: Tensor, tiles: Tensor, in_features: int) -> Tensor:
    """Returns ``grad_y @ W`` ``[N, in]``."""
    grad_x = grad_y.new_zeros(grad_y.shape[0], in_features)
    weight = weight.to(grad_y.dtype)
    for tile in tiles_of(tiles):
        if tile.width:
            grad_x[:, : tile.width].addmm_(grad_y[:, tile.row_start : tile.row_end], tile.of(weight))
    return grad_x


def grad_weight(grad_y: Tensor, x: Tensor, prefix: Tensor, tiles: Tensor, numel: int) -> Tensor:
    """Returns ``grad_yᵀ @ x`` ``[numel]`` in packed storage, with exact zeros in the padding."""
    grad = grad_y.new_empty(numel)
    grad_y_t = grad_y.t().contiguous()  # each tile's rows are then one block: a quarter less time than strided ones
    for tile in tiles_of(tiles):
        if tile.width:
            torch.mm(grad_y_t[tile.row_start : tile.row_end], x[:, : tile.width], out=tile.of(grad))
    return zero_padding(grad, prefix, tiles)
