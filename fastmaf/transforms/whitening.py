"""Gaussian whitening by a factor-analysis covariance, fitted in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmaf.kernels.autocast import matmul
from fastmaf.transforms.base import Transform
from fastmaf.transforms.factor_analysis import Augment, FactorModel, fit_factors, fit_factors_of_folds
from fastmaf.validation import as_tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class GaussianWhitening(Transform):
    """Whitening of a Gaussian with a factor-analysis covariance, x ~ N(μ, Ψ^½ (I + P S² Pᵀ) Ψ^½)::

        y = Ψ^(−½) (x − μ),    z = y + P ((1 + S²)^(−½) − 1) Pᵀ y
        ladj = −½ log det Ψ − ½ Σ_k log(1 + S²_k)

    The transform is the symmetric root of the inverse covariance (ZCA in units of the noise). Of all whitenings it
    gives the z closest to y, so that z[d] belongs to x[d]. Both directions take O(D · rank) operations. Before ``fit_``
    it is the identity. In float32 the error of the inverse grows with the standard deviation of the strongest factor,
    √(1 + S²). ``MAF(..., whitening=rank)`` puts it in front of its blocks, for few samples of many dimensions.

    Args:
        features: D.
        rank: number of factors, the columns of P.
        device: the device of the buffers.
        dtype: the dtype of the buffers.

    Attributes:
        mean: μ ``[D]``.
        scale: Ψ^½ ``[D]``, the standard deviation of the noise in units of x.
        factors: P ``[D, rank]`` with orthonormal columns; unsupported factors are zero.
        variance: S² ``[rank]`` in units of the variance of the noise.

    Raises:
        ValueError: an argument is out of range.

    References:
        Rubin and Thayer 1982, EM algorithms for ML factor analysis. Kessy, Lewin and Strimmer 2018, Optimal Whitening
        and Decorrelation.

    Example:
        >>> x = torch.randn(500, 3) @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 2.0]])
        >>> whitening = fastmaf.GaussianWhitening(features=3, rank=1).fit_(x)
        >>> z, ladj = whitening(x)
        >>> torch.allclose(whitening.inverse(z)[0], x, atol=1e-4)
        True
    """

    mean: Tensor
    scale: Tensor
    factors: Tensor
    variance: Tensor

    def __init__(
        self, features: int, rank: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1; found {features}")
        if not 0 <= rank <= features:
            raise ValueError(f"rank must be 0 to features = {features}; found {rank}")
        self.features, self.rank = features, rank
        self.register_buffer("mean", torch.zeros(features, device=device, dtype=dtype))
        self.register_buffer("scale", torch.ones(features, device=device, dtype=dtype))
        self.register_buffer("factors", torch.zeros(features, rank, device=device, dtype=dtype))
        self.register_buffer("variance", torch.zeros(rank, device=device, dtype=dtype))

    @torch.no_grad()
    def fit_(
        self,
        x: Tensor | ArrayLike,
        *,
        augment: Augment | None = None,
        source: Tensor | None = None,
        folds: int = 5,
        floor: float | None = None,
        seed: int = 0,
    ) -> GaussianWhitening:
        """Fits the covariance to data in closed form.

        Args:
            x: ``[n, D]``, n >= 2, finite; a tensor, a NumPy array or a nested list.
            augment, source, folds, floor, seed: as ``fastmaf.transforms.factor_analysis.fit_factors``.

        Returns:
            The transform itself.

        Raises:
            TypeError: ``x`` is neither a tensor nor an array of numbers.
            ValueError: ``x`` has another shape or is not finite, or an argument is out of range.
        """
        x = as_tensor("x", x, self.mean)
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"x must have shape [n, {self.features}]; found {list(x.shape)}")
        self.set_(fit_factors(x, self.rank, augment=augment, source=source, folds=folds, floor=floor, seed=seed))
        return self

    @classmethod
    @torch.no_grad()
    def fit_without(
        cls,
        x: Tensor,
        rank: int,
        parts: Sequence[Tensor],
        *,
        augment: Augment | None = None,
        source: Tensor | None = None,
        floor: float | None = None,
        seed: int = 0,
    ) -> tuple[list[GaussianWhitening], GaussianWhitening]:
        """Fits one transform without each part of the data, and one to all, for little more than the cost of one.

        For cross-validation; see ``fastmaf.transforms.factor_analysis.fit_factors_of_folds``.

        Args:
            x: ``[n, D]``, n >= 2, finite.
            rank: number of factors.
            parts: indices of at least two disjoint sets of samples.
            augment, source, floor, seed: as ``fit_``.

        Returns:
            The transforms without each part, and the transform of all samples.

        Raises:
            ValueError: ``x`` has another shape or is not finite, or an argument is out of range.

        Example:
            >>> x = torch.randn(60, 5)
            >>> without, whole = fastmaf.GaussianWhitening.fit_without(x, 2, torch.arange(60).split(20))
            >>> z, ladj = without[0](x[:20])  # samples that this transform has not seen
        """
        models, whole = fit_factors_of_folds(x, rank, parts, augment=augment, source=source, floor=floor, seed=seed)
        fitted = [cls(x.shape[1], min(rank, x.shape[1]), dtype=x.dtype, device=x.device) for _ in (*models, whole)]
        for whitening, model in zip(fitted, (*models, whole), strict=True):
            whitening.set_(model)
        return fitted[:-1], fitted[-1]

    @torch.no_grad()
    def set_(self, model: FactorModel) -> None:
        """Copies a fitted model; missing factors are zero."""
        rank = model.factors.shape[1]
        self.mean.copy_(model.mean)
        self.scale.copy_(model.scale)
        self.factors.zero_()[:, :rank].copy_(model.factors)
        self.variance.zero_()[:rank].copy_(model.variance)

    @property
    def ladj(self) -> Tensor:
        """The log-determinant ``log |det dz/dx|`` in nats, float64 ``[]``, computed from the buffers."""
        return -self.scale.double().log().sum() - 0.5 * self.variance.double().log1p().sum()

    @property
    def terms(self) -> Tensor:
        """The contribution of each dimension to ``-ladj`` ``[D]``; its share of ½ log(1 + S²_k) is P²_dk."""
        half_logs = 0.5 * self.variance.log1p()
        shares = matmul(self.factors.square(), half_logs[:, None])[:, 0]
        # P² sums to 1 over the dimensions only up to the rounding of P.
        total = shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
        return self.scale.log() + shares * (half_logs.sum() / total)

    def _along(self, y: Tensor) -> Tensor:
        """Returns the components ``y P`` ``[N, rank]``."""
        return self._orthonormal(matmul(y, self.factors))

    def _across(self, along: Tensor) -> Tensor:
        """Returns ``along Pᵀ`` ``[N, D]``."""
        return matmul(self._orthonormal(along), self.factors.mT)

    def _orthonormal(self, along: Tensor) -> Tensor:
        """Returns ``along (3I − PᵀP) / 2``, which corrects for the rounding of P (see ``orthonormalised``).

        Only in float64, where P may have been fitted in float32.
        """
        if along.dtype != torch.float64:
            return along
        return 1.5 * along - 0.5 * matmul(matmul(along, self.factors.mT), self.factors)

    def _scaled(self, y: Tensor, factor: Tensor, less_one: Tensor) -> Tensor:
        """Multiplies the components of y along the factors by ``factor``, which equals 1 + ``less_one``.

        A second correction removes the rounding error of large components that become small.
        """
        if not self.rank:
            return y
        along = self._along(y)
        z = y + self._across(along * less_one)
        return z + self._across(along * factor - self._along(z))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        root = (1 + self.variance).sqrt()
        # 1/root - 1 without cancellation.
        z = self._scaled((x - self.mean) / self.scale, 1 / root, -self.variance / (root * (1 + root)))
        return z, x.new_zeros(x.shape[0]) + self.ladj.to(x.dtype)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        root = (1 + self.variance).sqrt()
        y = self._scaled(z, root, self.variance / (1 + root))
        return y * self.scale + self.mean, z.new_zeros(z.shape[0]) - self.ladj.to(z.dtype)

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(x)[0], terms + self.terms

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, within, expected in (("scale", torch.gt, "positive"), ("variance", torch.ge, "not negative")):
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, Tensor) and not value.is_meta and not bool(within(value, 0).all()):
                raise ValueError(f"{prefix}{name} must be {expected}; found {float(value.min())}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def config(self) -> dict[str, Any]:
        return {"features": self.features, "rank": self.rank}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GaussianWhitening:
        return cls(config["features"], config["rank"], dtype=tensors["mean"].dtype)

    def extra_repr(self) -> str:
        return f"features={self.features}, rank={self.rank}"
