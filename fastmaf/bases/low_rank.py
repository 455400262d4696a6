"""Gaussians with a diagonal covariance plus one of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fastmaf.bases.base import HALF_LOG_2PI, Base, check_count
from fastmaf.kernels.autocast import matmul


class LowRankGaussian(Base):
    """A Gaussian with a covariance of a diagonal and ``rank`` factors, all trained::

        p(z) = N(loc, S (I + V Vᵀ) S),    S = diag(exp(log_scale)),    V = S⁻¹ factors
        log p(z) = −½ (|y − V a|² + |a|²) − Σ_d log_scale[d] − ½ log det C − ½ D log 2π
        y = S⁻¹ (z − loc),    C = I + Vᵀ V,    a = C⁻¹ Vᵀ y

    The covariance is thus S² + factors · factorsᵀ. ``|y − V a|² + |a|²``, which equals yᵀ (I + V Vᵀ)⁻¹ y, subtracts no
    two large numbers, and is not sensitive to the rounding of a, which minimises it. The cost is of order
    N · D · rank + D · rank². The dimensions are not independent: there is no ``nll_per_dim``.

    Args:
        features: D.
        rank: number of factors, 1 to D.
        generator: source of the factors at the start, normal with standard deviation 0.1/√D; None uses torch's global
            generator. Means start at 0 and the diagonal at 1.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is out of range.

    References:
        Woodbury 1950, Inverting modified matrices. Rubin and Thayer 1982, EM algorithms for ML factor analysis.

    Example:
        >>> base = fastmaf.LowRankGaussian(8, rank=2)
        >>> flow = fastmaf.MAF(features=8, blocks=2, hidden_features=16, base=base)
        >>> flow.log_prob(torch.randn(5, 8)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        rank: int,
        *,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = check_count("features", features)
        self.rank = check_count("rank", rank, features)
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        self.loc = nn.Parameter(torch.zeros(features, **make))
        self.log_scale = nn.Parameter(torch.zeros(features, **make))
        # At zero its gradient would be zero, too.
        factors = torch.empty(features, rank, **make).normal_(0, 0.1 / features**0.5, generator=generator)
        self.factors = nn.Parameter(factors)

    @property
    def noise_features(self) -> int:
        return self.features + self.rank

    def log_prob(self, z: Tensor) -> Tensor:
        inverse_scale = (-self.log_scale).exp()
        y, v = (z - self.loc) * inverse_scale, self.factors * inverse_scale[:, None]
        identity = torch.eye(self.rank, dtype=v.dtype, device=v.device)
        # Not torch.linalg.cholesky, which waits for a GPU to see whether it failed.
        root = torch.linalg.cholesky_ex(identity + matmul(v.mT, v))[0]
        a = torch.cholesky_solve(matmul(y, v).mT, root).mT
        squares = (y - matmul(a, v.mT)).square().sum(dim=1) + a.square().sum(dim=1)
        half_log_det = self.log_scale.sum() + root.diagonal().log().sum()
        return -0.5 * squares - half_log_det - self.features * HALF_LOG_2PI

    def from_noise(self, noise: Tensor) -> Tensor:
        own, common = noise[:, : self.features], noise[:, self.features :]
        return torch.addcmul(self.loc, own, self.log_scale.exp()) + matmul(common, self.factors.mT)

    def config(self) -> dict[str, Any]:
        return {"features": self.features, "rank": self.rank}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LowRankGaussian:
        # The parameters are overwritten; a generator of its own leaves torch's global one unchanged.
        return cls(config["features"], config["rank"], generator=Generator(), dtype=tensors["loc"].dtype)

    def extra_repr(self) -> str:
        return f"features={self.features}, rank={self.rank}"
