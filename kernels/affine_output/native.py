"""Output layer fused with the affine transform by the C++ kernels of ``csrc/``; as ``torch.py``.

The ``[N, 2D]`` product exists for a block of rows at a time, in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaf.kernels import native_library
from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.affine_output.args import AffineArgs, AffineBatch

native_library.load()
_ops = torch.ops.fastmaf_native
why_not = native_library.why_not


def forward(h: Tensor, x: Tensor, args: AffineArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z`` ``[N, D]``, ``ladj`` ``[N]`` and ``log_scale`` ``[N, D]``; the weight may be bfloat16."""
    return _ops.affine_output(h, x, *args)


def backward(batch: AffineBatch, args: AffineArgs, need_inputs: bool, need_weight: bool) -> tuple[Tensor, ...]:
    """Returns the gradients of ``h``, the packed weight, the bias and ``x``; those not needed may be empty."""
    return _ops.affine_output_backward(*_arguments(batch, args), need_weight)


def adam_(batch: AffineBatch, args: AffineArgs, need_inputs: bool, update: Update) -> tuple[Tensor, ...]:
    """Takes a step of Adam on the weight, in place; returns the gradients of ``h``, the bias and ``x``."""
    moments = update.exp_avg, update.exp_avg_sq
    return _ops.affine_output_adam_(
        *_arguments(batch, args), need_inputs, *moments, update.scale, update.numbers.native_floats()
    )


def squared_norm(batch: AffineBatch, args: AffineArgs) -> float:
    """Returns the sum of the squares of the weight's gradient."""
    return float(_ops.affine_output_squared_norm(*_arguments(batch, args)))


def _arguments(batch: AffineBatch, args: AffineArgs) -> tuple[object, ...]:
    # Autograd hands on gradients of any strides, such as an expanded sum's.
    weight, _, *rest = args
    grads = (grad.contiguous() for grad in batch[:3])
    return *grads, *batch[3:], weight.to(batch.h.dtype), *rest
