"""A normal distribution with few factors, and comparisons of models that are fitted to its samples."""

from __future__ import annotations

import torch
from torch import Tensor

import fastmaf
from fastmaf.transforms.factor_analysis import FactorModel
from tests.core.helpers import generator, normal
from tests.tolerances import F64, error


def covariance(of: FactorModel) -> Tensor:
    mean, scale, factors, variance = (t.double() for t in of)
    return scale[:, None] * (torch.eye(len(mean), dtype=F64) + (factors * variance) @ factors.T) * scale


def density(of: FactorModel) -> fastmaf.Flow:
    whitening = fastmaf.GaussianWhitening(len(of.mean), of.factors.shape[1], dtype=of.mean.dtype)
    whitening.set_(of)
    return fastmaf.Flow(len(of.mean), [whitening])


class World:
    """A normal distribution with few factors."""

    def __init__(
        self, features: int, rank: int, *, strongest: float = 8.0, weakest: float = 1.0, seed: int = 0
    ) -> None:
        draw = generator(seed)
        self.mean = torch.randn(features, generator=draw, dtype=F64)
        self.scale = 0.5 + torch.rand(features, generator=draw, dtype=F64)
        strengths = torch.linspace(strongest, weakest, rank, dtype=F64)
        self.loadings = torch.randn(features, rank, generator=draw, dtype=F64) * strengths
        self.covariance = self.loadings @ self.loadings.T + self.scale.square().diag()

    def draw(self, n: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
        features, rank = self.loadings.shape
        x = self.mean + normal(n, rank, seed=seed) @ self.loadings.T + self.scale * normal(n, features, seed=seed + 500)
        return x.to(dtype)


def nll(of: FactorModel, x: Tensor) -> float:
    """Returns nats per dimension."""
    return -float(density(of).log_prob(x).mean()) / x.shape[1]


def mean_square(of: FactorModel, x: Tensor) -> float:
    return float(density(of)(x)[0].square().mean())


def close(actual: FactorModel, expected: FactorModel, tolerance: float = 1e-9) -> None:
    assert error(actual.mean, expected.mean) < tolerance
    assert error(covariance(actual), covariance(expected)) < tolerance


def shifted(x: Tensor) -> Tensor:
    """Returns three rows for each row: shifted by 0, 1 and 2 places."""
    return torch.stack((x, x.roll(1, dims=1), x.roll(2, dims=1)), dim=1)
