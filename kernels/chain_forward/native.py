"""Blocks in a row by the C++ kernels of their layers; as ``reference.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmaf.kernels import native_library

native_library.load()
why_not = native_library.why_not


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    prefixes: Sequence[Tensor],
    tiles: Sequence[Tensor],
    schedules: Sequence[Tensor],
    permutations: Sequence[Tensor],
    activation: str,
    bounds: Sequence[float],
    softs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Returns ``z`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dz/dx|; weights may be bfloat16 beside float32 ``x``."""
    depths = [schedule.shape[1] for schedule in schedules]
    result: tuple[Tensor, Tensor] = torch.ops.fastmaf_native.chain_forward(
        x, weights, biases, prefixes, tiles, depths, permutations, activation == "relu", bounds, softs
    )
    return result
