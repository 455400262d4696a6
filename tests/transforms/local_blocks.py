"""Local autoregressive blocks of many shapes, and what each output may depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from tests.core.helpers import generator
from tests.tolerances import F64

Shape = tuple[int, int, int]
# Bayer's matrices, as they are printed in books.
DITHER = {
    1: [[0]],
    2: [[0, 2], [3, 1]],
    4: [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]],
}
CASES: list[tuple[Shape, dict[str, Any]]] = [
    ((3, 4, 6), {}),
    ((1, 8, 4), {"patch": 4, "kernel": 3, "hidden": 1}),
    ((2, 3, 5), {"patch": 1, "kernel": 3, "hidden": 2}),
    ((3, 7, 1), {"patch": 1, "kernel": 5, "hidden": 2}),
    ((1, 5, 5), {"patch": 1, "kernel": 1}),
    ((2, 4, 2), {"patch": 2, "kernel": 1}),
    ((2, 6, 10), {"patch": 2, "kernel": 5, "hidden": 1}),
    ((3, 4, 4), {"hidden": 0}),
    ((1, 6, 6), {"hidden": 0, "kernel": 1, "reverse": True}),
    ((3, 4, 6), {"reverse": True, "log_scale_bound": 0.3}),
]
CASE = pytest.mark.parametrize("shape, options", CASES, ids=str)


def features_of(shape: Shape) -> int:
    return shape[0] * shape[1] * shape[2]


def block(shape: Shape, *, scale: float = 0.3, seed: int = 0, dtype: torch.dtype = F64, **options: Any) -> Any:
    """Returns a block with all parameters drawn at random, including those that start at zero."""
    actual = fastmaf.LocalAutoregressive(shape, generator=generator(seed), **options).to(dtype)
    draw = generator(seed + 1)
    with torch.no_grad():
        for parameter in actual.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=draw, dtype=F64))
    return actual


def places(shape: Shape) -> list[tuple[int, int, int]]:
    """Returns channel, row and column of each dimension of x."""
    return [(c, i, j) for c in range(shape[0]) for i in range(shape[1]) for j in range(shape[2])]


def degrees(shape: Shape, *, patch: int = 2, reverse: bool = False, **_: Any) -> Tensor:
    """Returns the degree of each dimension of x: by the dither matrix, then by channel."""
    channels = shape[0]
    actual = torch.tensor([channels * DITHER[patch][i % patch][j % patch] + c for c, i, j in places(shape)])
    return channels * patch**2 - 1 - actual if reverse else actual


def within(shape: Shape, reach: int, *, patch: int = 2, **_: Any) -> Tensor:
    """Returns which dimensions ``[D, D]`` lie in patches at most ``reach`` apart, in either direction."""
    where = torch.tensor([(i // patch, j // patch) for _, i, j in places(shape)])
    return (where[:, None] - where).abs().amax(dim=2) <= reach
