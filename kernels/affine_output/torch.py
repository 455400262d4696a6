"""Output layer fused with the affine transform, in plain torch: the truth that the other backends are held against.

    (m, u)[d] = b + W h          rows 2d and 2d + 1 of the packed weight: a dimension's shift and its raw log-scale
    a = log_scale(u)             see ``AffineMap``
    z = (x - m) exp(-a),   ladj = -sum_d a[d]        SHIFT_FIRST
    z = exp(a) x + m,      ladj = +sum_d a[d]        SCALE_FIRST

Backwards, from the gradients of z, of ladj and of a itself, with x, z and a:

    grad_x = grad_z exp(-a),   grad_m = -grad_x,   grad_a = grad_log_scale - grad_ladj - grad_z z          SHIFT_FIRST
    grad_x = grad_z exp(a),    grad_m = grad_z,    grad_a = grad_log_scale + grad_ladj + grad_x x          SCALE_FIRST

and the gradients of rows 2d and 2d + 1 of the product are (grad_m, grad_a slope(a)).

Here the [N, 2D] product is formed for the sake of reading; a kernel has no need to store it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.affine_output.affine_map import SHIFT_FIRST
from fastmaf.kernels.affine_output.args import AffineArgs, AffineBatch
from fastmaf.kernels.masked_linear import torch as linear
from fastmaf.kernels.masked_linear.args import LinearBatch


def forward(h: Tensor, x: Tensor, args: AffineArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z`` ``[N, D]``, ``ladj`` ``[N]`` and ``log_scale`` ``[N, D]``."""
    affine_map = args.affine_map
    shift, raw = linear.forward(h, args.linear).unflatten(1, (-1, 2)).unbind(2)
    log_scale = affine_map.log_scale(raw).clone(memory_format=torch.contiguous_format)
    z = affine_map.forward(x, shift, log_scale)
    return z, affine_map.sign * log_scale.sum(1), log_scale


def backward(batch: AffineBatch, args: AffineArgs, need_inputs: bool, need_weight: bool) -> tuple[Tensor, ...]:
    """Returns the gradients of ``h``, the packed weight (zero in the padding), the bias and ``x``.

    That of the weight is empty when not needed, and those of ``h`` and ``x`` may be.
    """
    g, grad_x = grad_product(batch, args)
    return *linear.backward(product_batch(g, batch), args.linear, need_inputs, need_weight), grad_x


def adam_(batch: AffineBatch, args: AffineArgs, need_inputs: bool, update: Update) -> tuple[Tensor, ...]:
    """Takes a step of Adam on the weight, in place; returns the gradients of ``h``, the bias and ``x``."""
    g, grad_x = grad_product(batch, args)
    return *linear.adam_(product_batch(g, batch), args.linear, need_inputs, update), grad_x


def squared_norm(batch: AffineBatch, args: AffineArgs) -> Tensor:
    """Returns the sum of the squares of the weight's gradient."""
    return backward(batch, args, False, True)[1].double().square().sum()


def grad_product(batch: AffineBatch, args: AffineArgs) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the layer's product ``[N, 2D]`` and, through the transform alone, of ``x``."""
    affine_map, a = args.affine_map, batch.log_scale
    grad_x = batch.grad_z * torch.exp(affine_map.sign * a)
    if affine_map.form == SHIFT_FIRST:
        grad_m, grad_a = -grad_x, -batch.grad_z * batch.z - batch.grad_ladj[:, None]
    else:
        grad_m, grad_a = batch.grad_z, grad_x * batch.x + batch.grad_ladj[:, None]
    grad_a = (grad_a + batch.grad_log_scale) * affine_map.slope(a)
    return torch.stack((grad_m, grad_a), dim=2).flatten(1), grad_x


def product_batch(g: Tensor, batch: AffineBatch) -> LinearBatch:
    """Returns the tensors of the backward pass of the layer's product, a ``masked_linear`` without activation."""
    return LinearBatch(g, batch.h, g)  # there is no y to be read
