"""Gaussian whitening: the part of a density that a covariance of factors and noise explains, in closed form.

The first step of a flow over few images of many dimensions: what ``MAF(..., whitening=rank)`` puts in front of its
blocks. ``fit_`` is in ``fastmaf.transforms.factor_analysis``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels.autocast import matmul
from fastmaf.transforms.base import Transform
from fastmaf.transforms.factor_analysis import Augment, FactorModel, fit_factors


class GaussianWhitening(Transform):
    """Whitens x ~ N(μ, Ψ^½ (I + P S² Pᵀ) Ψ^½), each dimension at its place:
    ``z = y + P ((1 + S²)^(-½) - 1) Pᵀ y`` with ``y = Ψ^(-½) (x - μ)``.

    The symmetric root of the inverse covariance (ZCA in the units of the noise): of all whitenings the one whose z
    stays closest to y, so that ``z[:, d]`` is what is surprising about ``x[:, d]``. It takes O(D · rank) operations,
    and so does its inverse. Unfitted it is the identity. In float32 the inverse is as exact as the covariance is
    well-conditioned: errors grow with the largest factor's deviation, √(1 + S²).

    Args:
        features: D.
        rank: factors, the columns of P.
        device, dtype: of the buffers.

    Attributes:
        mean: μ ``[D]``.
        scale: Ψ^½ ``[D]``, the noise's standard deviation, in the unit of x.
        factors: P ``[D, rank]``, orthonormal columns; those that the data did not support are zero.
        variance: S² ``[rank]``, in units of the noise's variance.

    References:
        Factor analysis: Rubin and Thayer 1982. Optimal whitening: Kessy, Lewin and Strimmer 2018 (ZCA).
    """

    mean: Tensor
    scale: Tensor
    factors: Tensor
    variance: Tensor

    def __init__(
        self,
        features: int,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1; found {features}")
        if not 0 <= rank <= features:
            raise ValueError(f"rank must be 0 to features = {features}; found {rank}")
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        self.features, self.rank = features, rank
        self.register_buffer("mean", torch.zeros(features, **make))
        self.register_buffer("scale", torch.ones(features, **make))
        self.register_buffer("factors", torch.zeros(features, rank, **make))
        self.register_buffer("variance", torch.zeros(rank, **make))

    @torch.no_grad()
    def fit_(
        self,
        x: Tensor,
        *,
        augment: Augment | None = None,
        folds: int = 5,
        floor: float | None = None,
        seed: int = 0,
    ) -> GaussianWhitening:
        """Fits the covariance to data, in closed form; see ``fit_factors`` of
        ``fastmaf.transforms.factor_analysis`` for the arguments.

        Returns:
            Itself.

        Raises:
            ValueError: ``x`` is not ``[n >= 2, D]``, not finite, or an argument does not fit.
        """
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"x must have shape [n, {self.features}]; found {list(x.shape)}")
        self.set_(fit_factors(x, self.rank, augment=augment, folds=folds, floor=floor, seed=seed))
        return self

    @torch.no_grad()
    def set_(self, model: FactorModel) -> None:
        """Takes over a fitted model; factors that it lacks stay zero."""
        found = model.factors.shape[1]
        self.mean.copy_(model.mean)
        self.scale.copy_(model.scale)
        self.factors.zero_()[:, :found].copy_(model.factors)
        self.variance.zero_()[:found].copy_(model.variance)

    @property
    def ladj(self) -> Tensor:
        """The log-determinant log |det dz/dx| in nats, a float64 scalar that is taken from the buffers on each use."""
        return -self.scale.double().log().sum() - 0.5 * self.variance.double().log1p().sum()

    @property
    def terms(self) -> Tensor:
        """Each dimension's share of ``-ladj`` ``[D]``: of ½ log(1 + S²_k) it is P²_dk."""
        half_logs = 0.5 * self.variance.log1p()
        shares = matmul(self.factors.square(), half_logs[:, None])[:, 0]
        # P² sums to 1 over the dimensions up to the rounding of the dtype that P was fitted in.
        total = shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
        return self.scale.log() + shares * (half_logs.sum() / total)

    def _along(self, y: Tensor) -> Tensor:
        """Returns the components ``y P`` ``[N, rank]``."""
        return self._orthonormal(matmul(y, self.factors))

    def _across(self, along: Tensor) -> Tensor:
        """Returns ``along Pᵀ`` ``[N, D]``."""
        return matmul(self._orthonormal(along), self.factors.mT)

    def _orthonormal(self, along: Tensor) -> Tensor:
        """Returns ``along (3I - PᵀP) / 2``: as if P were ``orthonormalised``, which it is to its own dtype's rounding.

        In float64 P may have come from float32.
        """
        if along.dtype != torch.float64:
            return along
        return 1.5 * along - 0.5 * matmul(matmul(along, self.factors.mT), self.factors)

    def _scaled(self, y: Tensor, factor: Tensor, less_one: Tensor) -> Tensor:
        """Returns y with its components along the factors multiplied by ``factor``, which is 1 + ``less_one``.

        Twice: a component of 1,000 that becomes 1 leaves what was rounded at 1,000; the second product takes it away.
        """
        if not self.rank:
            return y
        along = self._along(y)
        z = y + self._across(along * less_one)
        return z + self._across(along * factor - self._along(z))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        root = (1 + self.variance).sqrt()
        # 1/root - 1 without the difference of two numbers near each other.
        z = self._scaled((x - self.mean) / self.scale, 1 / root, -self.variance / (root * (1 + root)))
        return z, x.new_zeros(x.shape[0]) + self.ladj.to(x.dtype)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        root = (1 + self.variance).sqrt()
        y = self._scaled(z, root, self.variance / (1 + root))
        return y * self.scale + self.mean, z.new_zeros(z.shape[0]) - self.ladj.to(z.dtype)

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Transform``. ½ log(1 + S²_k) is shared among the dimensions as P²_dk."""
        return self.forward(x)[0], terms + self.terms

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, lowest in (("scale", "positive"), ("variance", "not negative")):
            found = state_dict.get(f"{prefix}{name}")
            if not isinstance(found, Tensor) or found.is_meta:
                continue
            if not bool(((found > 0) if name == "scale" else (found >= 0)).all()):
                raise ValueError(f"{prefix}{name} must be {lowest}; found {float(found.min())}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def config(self) -> dict[str, Any]:
        return {"features": self.features, "rank": self.rank}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GaussianWhitening:
        return cls(config["features"], config["rank"], dtype=tensors["mean"].dtype)

    def extra_repr(self) -> str:
        return f"features={self.features}, rank={self.rank}"
