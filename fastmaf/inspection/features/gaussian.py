"""A Gaussian of the features at each location of a grid, or one for all locations, and its held-out likelihood.

With the features x_l of location l, C numbers::

    z_l = F_l (x_l − μ_l),    F_l lower triangular,    F_lᵀ F_l = Σ_l⁻¹
    −log p(x_l) = ½ |z_l|² + ½ C log 2π − log det F_l

With about as many images as channels, the covariance S_l of a location alone is nearly singular. It is shrunk towards
the mean of all locations' covariances, S̄, by the share under which held-out images are most likely::

    Σ_l = (1 − a) S_l + a S̄ + r I

References:
    Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices (shrinkage); Defard et
    al. 2021, PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization (a Gaussian of
    pretrained features per location).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastmaf

_SHRINKAGES = (0.05, 0.1, 0.2, 0.5)
_RIDGE = 0.001  # r, of a channel's variance over all locations
_COMPARED_FOLDS = 2  # that decide on the shrinkage
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class LocationGaussian:
    """A Gaussian per location (P = L), or the same one at all locations (P = 1), and a flow of what it whitens.

    Attributes:
        mean: μ, float32 ``[P, C]``.
        factor: F, float32 ``[P, C, C]``, lower triangular.
        flow: of z, given the position; None: z is standard normal.
        positions: the context of the flow at each location, float32 ``[L, 2]``.
    """

    mean: Tensor
    factor: Tensor
    flow: fastmaf.Flow | None = None
    positions: Tensor | None = None

    def whitened(self, x: Tensor) -> Tensor:
        """Returns z of features ``[n, C, L]``, float32 ``[n, L, C]``."""
        y = x.permute(2, 1, 0) - self.mean[:, :, None]  # [L, C, n]
        return (self.factor @ y).permute(2, 0, 1)

    @torch.no_grad()
    def distances(self, x: Tensor) -> Tensor:
        """Returns how unusual features ``[n, C, L]`` are, float32 ``[n, L]``.

        That is the Mahalanobis distance, the norm of z; with a flow, the NLL of z in nats.
        """
        z = self.whitened(x)
        if self.flow is None:
            return z.square().sum(dim=2).sqrt()
        rows = [-self.flow.log_prob(image.contiguous(), self.positions) for image in z]
        return torch.stack(rows) if rows else z.new_empty(z.shape[:2])

    def nll(self, distances: Tensor) -> Tensor:
        """Returns the NLL of images with these ``distances`` ``[n, L]``, float64 ``[n]`` nats."""
        log_det = self.factor.diagonal(dim1=1, dim2=2).double().log().sum(dim=1)
        if self.flow is not None:
            return (distances.double() - log_det).sum(dim=1)
        constant = self.mean.shape[1] * _HALF_LOG_2PI - log_det
        return (0.5 * distances.double().square() + constant).sum(dim=1)


class Moments(NamedTuple):
    """Sums over n images: of the features ``[L, C]``, and of their products ``[L, C, C]``."""

    n: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Returns the moments of features ``[n, C, L]``."""
        y = x.permute(2, 1, 0)
        return cls(len(x), y.sum(dim=2), y @ y.transpose(1, 2))

    def without(self, part: Moments) -> Moments:
        """Returns the moments of the other images."""
        return Moments(self.n - part.n, self.total - part.total, self.products - part.products)


class Folds(NamedTuple):
    """The Gaussian without the images of each fold, that of all images, and how much they were shrunk."""

    folds: list[LocationGaussian]
    whole: LocationGaussian
    shrinkage: float | None


def fit_gaussians(x: Tensor, folds: Sequence[np.ndarray], *, pooled: bool) -> Folds:
    """Fits Gaussians to the features of good images, without each fold and to all.

    Products of features are summed once for every fold, and subtracted from those of all.

    Args:
        x: features, float32 ``[n, C, L]``.
        folds: indices of the images of each.
        pooled: one Gaussian for all locations.
    """
    centre = x.mean(dim=(0, 2))
    spread = (x - centre[:, None]).square().mean(dim=(0, 2)).sqrt()
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))  # a channel that never varies
    offset = centre[None] if pooled else x.mean(dim=0).T  # [P, C]: sums of small numbers lose no digits
    y = (x - offset.T) / spread[:, None]
    parts = [Moments.of(y[torch.from_numpy(fold)]) for fold in folds]
    whole = Moments(len(x), sum(p.total for p in parts), sum(p.products for p in parts))  # type: ignore[arg-type]
    shrinkage = None
    if not pooled:
        shrinkage = min(_SHRINKAGES, key=lambda a: _held_out_nll(y, folds, parts, whole, a))

    def fitted(moments: Moments) -> LocationGaussian:
        standard = _gaussian(moments, shrinkage)
        return LocationGaussian(standard.mean * spread + offset, (standard.factor / spread).contiguous())

    return Folds([fitted(whole.without(part)) for part in parts], fitted(whole), shrinkage)


def _held_out_nll(
    y: Tensor, folds: Sequence[np.ndarray], parts: Sequence[Moments], whole: Moments, shrinkage: float
) -> float:
    total = 0.0
    for fold, part in list(zip(folds, parts, strict=True))[:_COMPARED_FOLDS]:
        gaussian = _gaussian(whole.without(part), shrinkage)
        total += float(gaussian.nll(gaussian.distances(y[torch.from_numpy(fold)])).sum())
    return total


def _gaussian(moments: Moments, shrinkage: float | None) -> LocationGaussian:
    """Returns the Gaussian of each location with this shrinkage, or for None that of all locations."""
    mean, square = moments.total / moments.n, moments.products / moments.n
    if shrinkage is None:
        mean, square = mean.mean(dim=0, keepdim=True), square.mean(dim=0, keepdim=True)
    covariance = square - mean[:, :, None] * mean[:, None]
    if shrinkage is not None:
        covariance = torch.lerp(covariance, covariance.mean(dim=0), shrinkage)
    identity = torch.eye(covariance.shape[1])
    root = torch.linalg.cholesky(covariance + _RIDGE * identity)
    return LocationGaussian(mean, torch.linalg.solve_triangular(root, identity.expand_as(root), upper=False))
