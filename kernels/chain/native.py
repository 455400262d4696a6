"""Blocks in a row by the C++ kernels of ``csrc/chain.cpp``, one team of threads throughout; as ``reference.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels import native_library
from fastmaf.kernels.block import Chain
from fastmaf.kernels.chain.reference import UPDATES_BIASES
from fastmaf.kernels.factors import Update

__all__ = ["UPDATES_BIASES", "adam_", "backward", "forward", "why_not"]

native_library.load()
_ops = torch.ops.fastmaf_native
why_not = native_library.why_not


def forward(x: Tensor, chain: Chain, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z``, ``ladj`` and what ``backward`` needs; weights may be bfloat16 beside float32 ``x``."""
    result: tuple[Tensor, Tensor, Tensor] = _ops.chain_forward(x, *_arguments(chain), keep)
    return result


def backward(
    grad_z: Tensor, grad_ladj: Tensor, kept: Tensor, chain: Chain, need_grad_x: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns the gradients of ``x`` (``[0, D]`` when not needed), the packed weights and the biases."""
    chain = chain._replace(weights=[weight.to(grad_z.dtype) for weight in chain.weights])
    result: tuple[Tensor, list[Tensor], list[Tensor]] = _ops.chain_backward(
        grad_z.contiguous(), grad_ladj.contiguous(), kept, *_arguments(chain), need_grad_x
    )
    return result


def adam_(
    grad_z: Tensor,
    grad_ladj: Tensor,
    kept: Tensor,
    chain: Chain,
    need_grad_x: bool,
    updates: Sequence[Update],
    bias_updates: None,
) -> tuple[Tensor, list[Tensor]]:
    """Takes a step of Adam on every weight, in place; returns the gradients of ``x`` and of the biases."""
    exp_avgs, exp_avg_sqs = [update.exp_avg for update in updates], [update.exp_avg_sq for update in updates]
    adam = [number for update in updates for number in native_library.adam_floats(update.numbers)]
    result: tuple[Tensor, list[Tensor]] = _ops.chain_adam_(
        grad_z.contiguous(), grad_ladj.contiguous(), kept, *_arguments(chain), need_grad_x, exp_avgs, exp_avg_sqs, adam
    )
    return result


def _arguments(chain: Chain) -> tuple[Any, ...]:
    depths = [len(layers) for layers in chain.layers_of_blocks()]
    relu = chain.activation == "relu"
    return (*chain[:4], depths, chain.permutations, relu, chain.bounds, chain.softs)
