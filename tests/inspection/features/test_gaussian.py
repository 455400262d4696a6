"""Gaussians of features against float64 truth, and what held-out likelihood selects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from fastmaf.inspection.features import gaussian
from fastmaf.inspection.features.gaussian import fit_gaussians
from fastmaf.inspection.out_of_fold import drop_fold, k_fold


def features(n: int = 40, channels: int = 5, locations: int = 6) -> torch.Tensor:
    """Correlated channels with another mean and scale at each location."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(n, locations, channels)) @ rng.normal(size=(channels, channels))
    scaled = mixed * rng.uniform(0.5, 2, (1, locations, 1)) + rng.normal(0, 3, (1, locations, channels))
    return torch.from_numpy(scaled).permute(0, 2, 1).float()


def truth(x: np.ndarray, shrinkage: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Means and covariances of ``[n, C, L]`` as the module documents them, in float64."""
    spread = x.std(axis=(0, 2))
    y = x / spread[:, None]
    if shrinkage is None:
        flat = y.transpose(0, 2, 1).reshape(-1, len(spread))
        means, covariances = flat.mean(0)[None], np.cov(flat.T, bias=True)[None]
    else:
        means = y.mean(0).T
        covariances = np.stack([np.cov(y[:, :, place].T, bias=True) for place in range(y.shape[2])])
        covariances = (1 - shrinkage) * covariances + shrinkage * covariances.mean(0)
    covariances = covariances + gaussian._RIDGE * np.eye(len(spread))
    return means * spread, covariances * spread[:, None] * spread


@pytest.mark.parametrize("pooled", [False, True])
def test_distances_and_nll_are_those_of_the_gaussians(pooled: bool) -> None:
    x = features()
    found = fit_gaussians(x, k_fold(len(x), 4), pooled=pooled)
    means, covariances = truth(x.double().numpy(), found.shrinkage)
    distances = found.whole.distances(x)
    places = [0] * 6 if pooled else range(6)
    expected, nll = np.empty((40, 6)), np.zeros(40)
    for place, which in enumerate(places):
        y = x[:, :, place].double().numpy() - means[which]
        expected[:, place] = np.sqrt(np.einsum("nc,cd,nd->n", y, np.linalg.inv(covariances[which]), y))
        nll -= multivariate_normal(means[which], covariances[which]).logpdf(x[:, :, place].double().numpy())
    np.testing.assert_allclose(distances.numpy(), expected, rtol=2e-4)
    np.testing.assert_allclose(found.whole.nll(distances).numpy(), nll, rtol=2e-4)


def test_the_gaussian_of_a_fold_is_that_of_the_other_images() -> None:
    """But for the unit of the ridge, which comes from all images."""
    x, folds = features(400), k_fold(400, 4)
    without = fit_gaussians(x, folds, pooled=True).folds[1]
    alone = fit_gaussians(drop_fold(x, folds[1]), k_fold(300, 2), pooled=True).whole
    np.testing.assert_allclose(without.mean.numpy(), alone.mean.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(without.distances(x).numpy(), alone.distances(x).numpy(), rtol=5e-3)


def test_more_images_are_shrunk_less() -> None:
    few, many = (fit_gaussians(features(n, 12), k_fold(n, 5), pooled=False).shrinkage for n in (15, 2000))
    assert few is not None and many is not None and few > many


def test_a_channel_that_never_varies_is_harmless() -> None:
    x = features()
    x[:, 2] = 3.0
    found = fit_gaussians(x, k_fold(len(x), 4), pooled=False)
    assert bool(found.whole.distances(x).isfinite().all())
