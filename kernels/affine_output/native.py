"""Output layer fused with the affine transform by the C++ kernels of ``csrc/``; as ``reference.py``.

The ``[N, 2D]`` product exists for a block of rows at a time, in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaf.kernels import native_library
from fastmaf.kernels.factors import Update

native_library.load()
_ops = torch.ops.fastmaf_native
why_not = native_library.why_not


def forward(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, prefix: Tensor, tiles: Tensor, bound: float, soft: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z`` ``[N, D]``, ``ladj`` ``[N]`` and ``log_scale`` ``[N, D]``; ``weight`` may be bfloat16."""
    result: tuple[Tensor, Tensor, Tensor] = _ops.affine_output(h, weight, bias, x, prefix, tiles, bound, soft)
    return result


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
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = _ops.affine_output_backward(
        *_contiguous(grad_z, grad_ladj, grad_log_scale),
        h,
        weight.to(h.dtype),
        z,
        log_scale,
        prefix,
        tiles,
        bound,
        soft,
        True,
    )
    return grads


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
    """Returns the gradients of ``h``, ``bias`` and ``x``."""
    grad_h, _, grad_bias, grad_x = _ops.affine_output_backward(
        *_contiguous(grad_z, grad_ladj, grad_log_scale), h, weight, z, log_scale, prefix, tiles, bound, soft, False
    )
    return grad_h, grad_bias, grad_x


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
    return backward(grad_z, grad_ladj, grad_log_scale, h, weight, z, log_scale, prefix, tiles, bound, soft)[1]


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
    result: tuple[Tensor, Tensor, Tensor] = _ops.affine_output_adam_(
        *_contiguous(grad_z, grad_ladj, grad_log_scale),
        h,
        weight,
        update.exp_avg,
        update.exp_avg_sq,
        z,
        log_scale,
        prefix,
        tiles,
        bound,
        soft,
        need_inputs,
        scale,
        native_library.adam_floats(update.numbers),
    )
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
) -> float:
    """Returns the sum of the squares of the gradient of ``weight``."""
    grads = _contiguous(grad_z, grad_ladj, grad_log_scale)
    return float(_ops.affine_output_squared_norm(*grads, h, weight, z, log_scale, prefix, tiles, bound, soft))


def _contiguous(*grads: Tensor) -> tuple[Tensor, ...]:
    """Autograd hands on gradients of any strides, such as an expanded sum's."""
    return tuple(grad.contiguous() for grad in grads)
