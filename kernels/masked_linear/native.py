"""Masked linear layer by the C++ kernels of ``csrc/`` (layers.cpp, forward.h, backward.h); as ``reference.py``.

Up to 8 samples a pass is bound by streaming the weight once; from about 32 on by multiply-adds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaf.kernels import native_library
from fastmaf.kernels.factors import Update

native_library.load()
_ops = torch.ops.fastmaf_native
why_not = native_library.why_not


def forward(x: Tensor, weight: Tensor, bias: Tensor, prefix: Tensor, tiles: Tensor, activation: str) -> Tensor:
    """Returns ``y`` ``[N, out]``; ``weight`` may be bfloat16 beside float32 ``x``."""
    result: Tensor = _ops.masked_linear(x, weight, bias, prefix, tiles, activation == "relu")
    return result


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
    grads: tuple[Tensor, Tensor, Tensor] = _ops.masked_linear_backward(
        grad_y.contiguous(), x, y, weight.to(x.dtype), prefix, tiles, activation == "relu", need_grad_x, True
    )
    return grads


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
    grad_x, _, grad_bias = _ops.masked_linear_backward(
        grad_y.contiguous(), x, y, weight, prefix, tiles, activation == "relu", need_grad_x, False
    )
    return grad_x, grad_bias


def grad_weight_of(
    grad_y: Tensor, x: Tensor, y: Tensor, weight: Tensor, prefix: Tensor, tiles: Tensor, activation: str
) -> Tensor:
    """Returns the gradient of the packed ``weight``, zero in the padding."""
    return backward(grad_y, x, y, weight, prefix, tiles, activation, False)[1]


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
    result: tuple[Tensor, Tensor] = _ops.masked_linear_adam_(
        grad_y.contiguous(),
        x,
        y,
        weight,
        update.exp_avg,
        update.exp_avg_sq,
        prefix,
        tiles,
        activation == "relu",
        need_grad_x,
        scale,
        native_library.adam_floats(update.numbers),
    )
    return result


def squared_norm(
    grad_y: Tensor, x: Tensor, y: Tensor, weight: Tensor, prefix: Tensor, tiles: Tensor, activation: str
) -> float:
    """Returns the sum of the squares of the gradient of ``weight``."""
    return float(
        _ops.masked_linear_squared_norm(grad_y.contiguous(), x, y, weight, prefix, tiles, activation == "relu")
    )
