"""Blocks in a row by the reference ops of their layers: the truth that the other backends are held against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmaf.kernels.affine_output import reference as affine
from fastmaf.kernels.masked_linear import reference as linear


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
    """Returns ``z`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dz/dx|; see ``fastmaf.kernels.block.Chain``."""
    ladj, layers = x.new_zeros(x.shape[0]), iter(zip(weights, biases, prefixes, tiles, strict=True))
    for schedule, permutation, bound, soft in zip(schedules, permutations[:-1], bounds, softs, strict=True):
        x = x[:, permutation] if permutation.numel() else x
        h = x
        for _ in range(schedule.shape[1] - 1):
            h = linear.forward(h, *next(layers), activation)
        weight, bias, prefix, table = next(layers)
        x, term, _ = affine.forward(h, weight, bias, x, prefix, table, bound, soft)
        ladj = ladj + term
    return (x[:, permutations[-1]] if permutations[-1].numel() else x.clone()), ladj
