"""Splitting normal images into folds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def k_fold(n: int, folds: int, seed: int = 0) -> list[np.ndarray]:
    """Splits 0..n-1 into random folds whose sizes differ by at most one; indices ascend within each fold.

    Raises:
        ValueError: there are fewer than 2 or more than n folds.
    """
    if not 2 <= folds <= n:
        raise ValueError(f"folds must be a whole number from 2 to the {n} normal images available; found {folds!r}")
    order = np.random.default_rng(seed).permutation(n)
    return [np.sort(fold) for fold in np.array_split(order, folds)]


def drop_fold(x: Tensor, fold: np.ndarray) -> Tensor:
    """Returns the rows of ``x`` that are not in ``fold``."""
    kept = torch.ones(len(x), dtype=torch.bool)
    kept[fold] = False
    return x[kept]
