"""Folds: every image is in exactly one, at random and repeatably."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmaf
from fastmaf.inspection.out_of_fold import OutOfFoldModels, drop_fold, k_fold


@pytest.mark.parametrize(("n", "folds"), [(2, 2), (5, 5), (219, 5), (10, 3)])
def test_k_fold(n: int, folds: int) -> None:
    parts = k_fold(n, folds)
    assert len(parts) == folds and sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for fold in parts:
        assert fold.dtype == np.int64 and (np.diff(fold) > 0).all()


def test_k_fold_follows_the_seed() -> None:
    first, again, other = ([fold.tolist() for fold in k_fold(50, 5, seed)] for seed in (0, 0, 1))
    assert first == again != other
    assert first != [list(range(i, i + 10)) for i in range(0, 50, 10)]


@pytest.mark.parametrize(("n", "folds"), [(5, 1), (5, 0), (5, -2), (5, 6), (1, 2), (0, 2)])
def test_k_fold_refuses(n: int, folds: int) -> None:
    with pytest.raises(ValueError, match=f"from 2 to the {n} good images available; found {folds}"):
        k_fold(n, folds)


def test_drop_fold_keeps_the_order_of_the_others() -> None:
    x = torch.arange(10.0).reshape(5, 2)
    assert torch.equal(drop_fold(x, np.array([3, 0])), x[[1, 2, 4]])


def test_a_subset_of_the_images_keeps_their_folds() -> None:
    flows = [fastmaf.Flow(3, [fastmaf.GaussianWhitening(3, 0)]) for _ in range(3)]
    models = OutOfFoldModels(k_fold(30, 3), flows)
    index, same = models.subset(30, 0)
    assert same is models and index.tolist() == list(range(30))
    index, fewer = models.subset(11, 0)
    assert len(index) == len(set(index.tolist())) == 11 and (np.diff(index) > 0).all()
    assert sorted(np.concatenate(fewer.folds).tolist()) == list(range(11))
    for fold, flow in zip(fewer.folds, fewer.flows, strict=True):
        (whole,) = [of for of, other in zip(models.folds, flows, strict=True) if other is flow]
        assert set(index[fold]) <= set(whole)
