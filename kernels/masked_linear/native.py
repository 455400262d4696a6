"""Masked linear layer by the C++ kernels of ``csrc/`` (layers.cpp, forward.h, backward.h); as ``torch.py``.

Up to 8 samples a pass is bound by streaming the weight once; from about 32 on by multiply-adds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaf.kernels import native_library
from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.masked_linear.args import LinearArgs, LinearBatch

native_library.load()
_ops = torch.ops.fastmaf_native
why_not = native_library.why_not


def forward(x: Tensor, args: LinearArgs) -> Tensor:
    """Returns ``y`` ``[N, out]``; the weight may be bfloat16 beside float32 ``x``."""
    return _ops.masked_linear(x, *args)


def backward(batch: LinearBatch, args: LinearArgs, need_inputs: bool, need_weight: bool) -> tuple[Tensor, ...]:
    """Returns the gradients of ``x``, the packed weight and the bias; the first two empty when not needed."""
    return _ops.masked_linear_backward(*_arguments(batch, args), need_inputs, need_weight)


def adam_(batch: LinearBatch, args: LinearArgs, need_inputs: bool, update: Update) -> tuple[Tensor, ...]:
    """Takes a step of Adam on the weight, in place; returns the gradients of ``x`` and the bias."""
    moments = update.exp_avg, update.exp_avg_sq
    return _ops.masked_linear_adam_(
        *_arguments(batch, args), need_inputs, *moments, update.scale, update.numbers.native_floats()
    )


def squared_norm(batch: LinearBatch, args: LinearArgs) -> float:
    """Returns the sum of the squares of the weight's gradient."""
    return float(_ops.masked_linear_squared_norm(*_arguments(batch, args)))


def _arguments(batch: LinearBatch, args: LinearArgs) -> tuple[object, ...]:
    weight, _, *rest = args
    return batch.grad_y.contiguous(), batch.x, batch.y, weight.to(batch.x.dtype), *rest
