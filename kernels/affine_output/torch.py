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

from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.affine_output.args import AffineArgs, AffineBatch
from fastmaf.kernels.masked_linear import torch as linear
from fastmaf.kernels.masked_linear.args import LinearArgs, LinearBatch


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


def forward(h: Tensor, x: Tensor, args: AffineArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z`` ``[N, D]``, ``ladj`` ``[N]`` and ``log_scale`` ``[N, D]``."""
    out = linear.forward(h, LinearArgs(*args[:4])).unflatten(1, (-1, 2))
    log_scale = bound_log_scale(out[..., 1], args.bound, args.soft).clone(memory_format=torch.contiguous_format)
    z = (x - out[..., 0]).mul_(torch.exp(-log_scale))
    return z, -log_scale.sum(1), log_scale


def backward(batch: AffineBatch, args: AffineArgs, need_inputs: bool, need_weight: bool) -> tuple[Tensor, ...]:
    """Returns the gradients of ``h``, the packed weight (zero in the padding), the bias and ``x``.

    That of the weight is empty when not needed, and those of ``h`` and ``x`` may be.
    """
    g, grad_x = grad_product(batch, args)
    return *linear.backward(product_batch(g, batch), LinearArgs(*args[:4]), need_inputs, need_weight), grad_x


def adam_(batch: AffineBatch, args: AffineArgs, need_inputs: bool, update: Update) -> tuple[Tensor, ...]:
    """Takes a step of Adam on the weight, in place; returns the gradients of ``h``, the bias and ``x``."""
    g, grad_x = grad_product(batch, args)
    return *linear.adam_(product_batch(g, batch), LinearArgs(*args[:4]), need_inputs, update), grad_x


def squared_norm(batch: AffineBatch, args: AffineArgs) -> Tensor:
    """Returns the sum of the squares of the weight's gradient."""
    return backward(batch, args, False, True)[1].double().square().sum()


def grad_product(batch: AffineBatch, args: AffineArgs) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the layer's product ``[N, 2D]`` and, through the transform alone, of ``x``."""
    grad_x = batch.grad_z * torch.exp(-batch.log_scale)
    grad_a = batch.grad_log_scale - batch.grad_z * batch.z - batch.grad_ladj[:, None]
    slope = bound_slope(batch.log_scale, args.bound, args.soft)
    return torch.stack((-grad_x, grad_a * slope), dim=2).flatten(1), grad_x


def product_batch(g: Tensor, batch: AffineBatch) -> LinearBatch:
    """Returns the tensors of the backward pass of the layer's product, a ``masked_linear`` without activation."""
    return LinearBatch(g, batch.h, g)  # there is no y to be read
