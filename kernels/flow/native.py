"""Flows by the C++ kernels of ``csrc/``, one team of threads throughout; the same functions as ``torch``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmaf.kernels import native_library
from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.flow.args import FlowArgs, FlowBatch
from fastmaf.kernels.flow.torch import UPDATES_BIASES, inverse_backward

__all__ = ["UPDATES_BIASES", "adam_", "backward", "forward", "inverse", "inverse_backward", "why_not"]

native_library.load()
_ops = torch.ops.fastmaf_native
_forward, _inverse = _ops.flow_forward.default, _ops.flow_inverse.default
why_not = native_library.why_not


def forward(x: Tensor, args: FlowArgs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z``, ``ladj`` and what ``backward`` needs; weights may be bfloat16 beside float32 ``x``."""
    return _forward(x, *args, save)


def backward(batch: FlowBatch, args: FlowArgs, need_grad_x: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns the gradients of ``x`` (``[0, D]`` when not needed), the packed weights and the biases."""
    args = args._replace(weights=[weight.to(batch.grad_z.dtype) for weight in args.weights])
    return _ops.flow_backward(*_contiguous(batch), *args, need_grad_x)


def adam_(
    batch: FlowBatch, args: FlowArgs, need_grad_x: bool, updates: Sequence[Update], bias_updates: None
) -> tuple[Tensor, list[Tensor]]:
    """Takes a step of Adam on every weight, in place; returns the gradients of ``x`` and of the biases."""
    exp_avgs, exp_avg_sqs = [update.exp_avg for update in updates], [update.exp_avg_sq for update in updates]
    floats = {numbers: numbers.native_floats() for numbers in {update.numbers for update in updates}}  # mostly one
    adam = [number for update in updates for number in floats[update.numbers]]
    return _ops.flow_adam_(*_contiguous(batch), *args, need_grad_x, exp_avgs, exp_avg_sqs, adam)


def _contiguous(batch: FlowBatch) -> FlowBatch:
    # Autograd hands on gradients of any strides, such as an expanded sum's.
    return FlowBatch(batch.grad_z.contiguous(), batch.grad_ladj.contiguous(), batch.saved)


def inverse(z: Tensor, args: FlowArgs) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz|."""
    return _inverse(z, *args)
