"""The residual of principal component analysis."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from fastmaf.inspection.baselines.base import images_like_fitted, normal_images, sum_over_colours
from fastmaf.inspection.folds import drop_fold, k_fold
from fastmaf.inspection.scoring.score import TermStatistics, score_maps
from fastmaf.inspection.scoring.settings import ScoreSettings

_STANDARDISED = ScoreSettings("map maximum", sigma=2.0, clip=10.0)
_FOLDS = 5


class PCAResidual:
    """The squared norm of an image's residual after the principal components of normal images, on [0, 1] data.

    The map is the squared residual, summed over colours. If standardised, each dimension's squared residual is
    standardised by its mean and standard deviation over held-out normal images (5 folds), clipped at ±10, summed over
    colours and smoothed by 2 pixels, and the score is the maximum of this map.

    Args:
        components: number of components; fewer if there are fewer normal images.
        standardised: see above.
    """

    def __init__(self, components: int = 100, *, standardised: bool = False) -> None:
        if components < 1:
            raise ValueError(f"components must be at least 1; found {components}")
        self.components, self.standardised = components, standardised
        self.name = "PCA standardised map" if standardised else f"PCA residual ({components})"

    def fit(self, pixels: Tensor) -> PCAResidual:
        """See ``Baseline``."""
        x = normal_images(pixels)
        self.mean, self.basis = _principal(x, self.components)
        if self.standardised:
            held_out = torch.empty_like(x)
            for fold in k_fold(len(x), min(_FOLDS, len(x)), 0):
                held_out[fold] = _residual(x[fold], *_principal(drop_fold(x, fold), self.components))
            self.statistics = TermStatistics.of(held_out, held_out.sum(dim=1))
        return self

    def score(self, pixels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """See ``Baseline``."""
        terms = _residual(images_like_fitted(pixels, len(self.mean)), self.mean, self.basis)
        if not self.standardised:
            return terms.sum(dim=1).numpy(), sum_over_colours(terms)
        maps = score_maps(terms, self.statistics, _STANDARDISED)
        return maps.flatten(1).amax(dim=1).numpy(), maps.float().numpy()


def _principal(x: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Returns mean [D] and components [r, D] of samples [n, D], fewer than requested if x has a lower rank."""
    with np.errstate(invalid="ignore"):  # the explained variance of a single sample is 0 / 0
        pca = PCA(svd_solver="full").fit(x.numpy())
    deviation = pca.singular_values_
    # Beyond the rank the components are arbitrary: what they explain of a new image would be chance.
    rank = int((deviation > max(x.shape) * np.finfo(np.float64).eps * deviation[0]).sum())
    return torch.from_numpy(pca.mean_), torch.from_numpy(pca.components_[: min(components, rank)])


def _residual(x: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """Returns the squared residual [n, D]."""
    centred = x - mean
    return (centred - centred @ basis.T @ basis).square()
