"""Output layer fused with the affine transform, in plain torch: the truth that the other backends are held against.

    (m, u)[d] = b + W h          rows 2d and 2d + 1 of the packed weight: a dimension's shift and its raw log-scale
    a = bound(u)                 clamp(u, -B, B), or B tanh(u / B) when soft; B = inf leaves u alone
    z = (x - m) exp(-a),   ladj = -sum_d a[d]                        (MAF, Papamakarios et al. 2017, eq. 3-5)

Here the [N, 2D] product is formed for the sake of reading; a kernel has no need to store it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmaf.kernels.adam import adam_step_
from fastmaf.kernels.factors import Update
from fastmaf.kernels.masked_linear import reference as linear


def bound_log_scale(u: Tensor, bound: float, soft: bool) -> Tensor:
    """Returns the log-scale ``a`` for the network's raw output ``u``."""
    if math.isinf(bound):
        return u
    return bound * torch.tanh(u / bound) if soft else u.clamp(-bound, bound)


def bound_slope(a: Tensor, bound: float, soft: bool) -> Tensor:
    """Returns da/du as a function of the bounded value ``a``: zero where the clamp holds."""
    if math.isinf(bound):
        return torch.ones_like(a)
    return 1 - (a / bound).square() if soft else (a.abs() < bound).to(a.dtype)


def forward(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, prefix: Tensor, tiles: Tensor, bound: float, soft: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z`` ``[N, D]``, ``ladj`` ``[N]`` and ``log_scale`` ``[N, D]``."""
    out = linear.forward(h, weight, bias, prefix, tiles, "identity").unflatten(1, (-1, 2))
    log_scale = bound_log_scale(out[..., 1], bound, soft).clone(memory_format=torch.contiguous_format)
    z = (x - out[..., 0]).mul_(torch.exp(-log_scale))
    return z, -log_scale.sum(1), log_scale


def backward(
    grad_z: Tensor,
    grad_ladj: Tensor,
    grad_log_scale: Tensor,
    h: Tensor,
    weight: Tensor,
    z: Tensor,
    log_scale: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    bound: float,
    soft: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of ``h``, packed ``weight`` (zero in the padding), ``bias`` and ``x``."""
    batch = grad_z, grad_ladj, grad_log_scale, h, z, log_scale
    grad_h, grad_bias, grad_x = grad_inputs(*batch, weight, prefix, tiles, bound, soft, True)
    return grad_h, grad_weight_of(*batch, weight, prefix, tiles, bound, soft), grad_bias, grad_x


def _grad_out(
    grad_z: Tensor,
    grad_ladj: Tensor,
    grad_log_scale: Tensor,
    z: Tensor,
    log_scale: Tensor,
    bound: float,
    soft: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the layer's product ``[N, 2D]`` and of ``x``."""
    grad_x = grad_z * torch.exp(-log_scale)
    grad_a = grad_log_scale - grad_z * z - grad_ladj[:, None]
    return torch.stack((-grad_x, grad_a * bound_slope(log_scale, bound, soft)), dim=2).flatten(1), grad_x


def grad_inputs(
    grad_z: Tensor,
    grad_ladj: Tensor,
    grad_log_scale: Tensor,
    h: Tensor,
    z: Tensor,
    log_scale: Tensor,
    weight: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    bound: float,
    soft: bool,
    need_inputs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of ``h``, ``bias`` and ``x``; those of ``h`` and ``x`` are empty when not needed."""
    grad_out, grad_x = _grad_out(grad_z, grad_ladj, grad_log_scale, z, log_scale, bound, soft)
    if not need_inputs:
        return h.new_empty(0), grad_out.sum(0), h.new_empty(0)
    return linear.grad_input(grad_out, weight, tiles, h.shape[1]), grad_out.sum(0), grad_x


def grad_weight_of(
    grad_z: Tensor,
    grad_ladj: Tensor,
    grad_log_scale: Tensor,
    h: Tensor,
    z: Tensor,
    log_scale: Tensor,
    weight: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    bound: float,
    soft: bool,
) -> Tensor:
    """Returns the gradient of the packed ``weight``, zero in the padding."""
    grad_out, _ = _grad_out(grad_z, grad_ladj, grad_log_scale, z, log_scale, bound, soft)
    return linear.grad_weight(grad_out, h, prefix, tiles, weight.shape[0])


def adam_(
    grad_z: Tensor,
    grad_ladj: Tensor,
    grad_log_scale: Tensor,
    h: Tensor,
    z: Tensor,
    log_scale: Tensor,
    weight: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    bound: float,
    soft: bool,
    need_inputs: bool,
    update: Update,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes a step of Adam with ``scale`` times the gradient of ``weight``; returns what ``grad_inputs`` does."""
    batch = grad_z, grad_ladj, grad_log_scale, h, z, log_scale
    result = grad_inputs(*batch, weight, prefix, tiles, bound, soft, need_inputs)
    grad = grad_weight_of(*batch, weight, prefix, tiles, bound, soft)
    adam_step_(weight, grad.mul_(scale), update)
    return result


def squared_norm(
    grad_z: Tensor,
    grad_ladj: Tensor,
    grad_log_scale: Tensor,
    h: Tensor,
    z: Tensor,
    log_scale: Tensor,
    weight: Tensor,
    prefix: Tensor,
    tiles: Tensor,
    bound: float,
    soft: bool,
) -> Tensor:
    """Returns the sum of the squares of the gradient of ``weight``."""
    batch = grad_z, grad_ladj, grad_log_scale, h, z, log_scale
    return grad_weight_of(*batch, weight, prefix, tiles, bound, soft).double().square().sum()
