"""Level-scheduled inverse by the C++ kernel of ``csrc/level_inverse.cpp``; as ``reference.py``.

A chain of blocks is one call. The backward pass is the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmaf.kernels import native_library
from fastmaf.kernels.level_inverse.reference import backward

__all__ = ["backward", "chain", "forward", "why_not"]

native_library.load()
_ops = torch.ops.fastmaf_native
why_not = native_library.why_not


def forward(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    prefixes: Sequence[Tensor],
    tiles: Sequence[Tensor],
    schedule: Tensor,
    activation: str,
    bound: float,
    soft: bool,
) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz|."""
    none = torch.empty(0, dtype=torch.int64)
    return chain(z, weights, biases, prefixes, tiles, [schedule], [none, none], activation, [bound], [soft])


def chain(
    z: Tensor,
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
    """Returns ``x`` and ``ladj`` of several blocks' inverses in turn; see ``reference.chain``."""
    result: tuple[Tensor, Tensor] = _ops.level_inverse(
        z, weights, biases, prefixes, tiles, schedules, permutations, activation == "relu", bounds, softs
    )
    return result
