"""The interface of a baseline, and checks that baselines share."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from torch import Tensor

from fastmaf.images.dataset import to_unit


class Baseline(Protocol):
    """A simple score. ``name`` identifies it in tables."""

    name: str

    def fit(self, pixels: Tensor) -> Baseline:
        """Fits to normal images, uint8 [n, 3, s, s], n >= 2, and returns itself."""
        ...

    def score(self, pixels: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns anomaly scores, float64 [n], and anomaly maps, float32 [n, s, s], or None if it has no maps."""
        ...


def normal_images(pixels: Tensor) -> Tensor:
    """Returns normal images as float64 ``[n, D]`` on [0, 1]; raises a ValueError for fewer than 2."""
    x = to_unit(pixels).double()
    if len(x) < 2:
        raise ValueError(f"pixels: a baseline is fitted to at least 2 normal images; found {len(x)}")
    return x


def images_like_fitted(pixels: Tensor, features: int) -> Tensor:
    """Returns images as float64 ``[n, features]`` on [0, 1]; raises a ValueError for another size."""
    x = to_unit(pixels).double()
    if x.shape[1] != features:
        size = math.isqrt(features // 3)
        raise ValueError(f"pixels: expected images of {size} pixels a side, as fitted; found {pixels.shape[-1]}")
    return x


def sum_over_colours(terms: Tensor) -> np.ndarray:
    """Returns terms ``[n, 3 s²]`` as maps, float32 ``[n, s, s]``."""
    size = math.isqrt(terms.shape[1] // 3)
    return terms.unflatten(1, (3, size, size)).sum(dim=1).float().numpy()
