"""Independent Student-t distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmaf.bases.base import Base, check_count, vector_of

_SERIES_FROM = 100.0  # where the remainder of the series is below the rounding of float64


class StudentT(Base):
    """Independent Student-t distributions of the dimensions, for data with heavy tails::

        log p(z) = Σ_d (log Γ((ν+1)/2) − log Γ(ν/2) − ½ log(νπ) − log_scale − (ν+1)/2 log(1 + y²/ν))
        y = (z − loc) exp(−log_scale),    ν = exp(log_df),    each of dimension d

    A flow of affine blocks with bounded log-scales has tails like those of its base, whatever its weights are.

    A sample is made of two standard normal numbers g, h for each dimension, differentiable also with respect to ν::

        y = g √(ν (exp(r²/ν) − 1) / r²),    r² = g² + h²

    Args:
        features: D.
        df: the degrees of freedom ν at the start, one number or ``[D]``, positive.
        loc: the locations at the start, one number or ``[D]``.
        scale: the scales at the start, one number or ``[D]``.
        trainable: whether these are parameters, or buffers that keep these values.
        device, dtype: of these.

    Raises:
        ValueError: an argument is out of range.

    References:
        Jaini, Kobyzev, Yu and Brubaker 2020, Tails of Lipschitz Triangular Flows. Bailey 1994, Polar Generation of
        Random Variates with the t-Distribution.

    Example:
        >>> base = fastmaf.StudentT(3, df=4.0)
        >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16, base=base)
        >>> flow.sample(5).shape
        torch.Size([5, 3])
    """

    loc: Tensor
    log_scale: Tensor
    log_df: Tensor

    def __init__(
        self,
        features: int,
        df: Tensor | float,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        *,
        trainable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features, self.trainable = check_count("features", features), trainable
        like = torch.empty(0, device=device, dtype=dtype)
        logs = [vector_of(*of, features, like, positive=True).log() for of in (("scale", scale), ("df", df))]
        self._hold(trainable, loc=vector_of("loc", loc, features, like), log_scale=logs[0], log_df=logs[1])

    @property
    def noise_features(self) -> int:
        return 2 * self.features

    def log_prob(self, z: Tensor) -> Tensor:
        return -self.nll_per_dim(z, torch.zeros_like(z)).sum(dim=1)

    def nll_per_dim(self, z: Tensor, terms: Tensor) -> Tensor:
        df = self.log_df.exp()
        t = ((z - self.loc) * (-self.log_scale - 0.5 * self.log_df).exp()).abs()
        # log(1 + t²) without an overflow of t²; a tie shares its gradient among maximum and minimum, as it must.
        one = torch.ones_like(t)
        above = torch.maximum(t, one)
        log1p = 2 * above.log() + (torch.minimum(t, one) / above).square().log1p()
        return terms + torch.addcmul(self.log_scale - _log_normaliser(self.log_df), 0.5 * (df + 1), log1p)

    def from_noise(self, noise: Tensor) -> Tensor:
        g, h = noise[:, : self.features], noise[:, self.features :]
        # Within the dtype, and above zero: there both factors of the ratio would vanish.
        squares = (g.square() + h.square()).clamp_min(torch.finfo(noise.dtype).tiny ** 0.5)
        ratio = squares * (-self.log_df).exp()
        y = g * (torch.expm1(ratio) / ratio).sqrt()
        return torch.addcmul(self.loc, y, self.log_scale.exp())

    def config(self) -> dict[str, Any]:
        return {"features": self.features, "trainable": self.trainable}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StudentT:
        return cls(config["features"], 1.0, trainable=config["trainable"], dtype=tensors["loc"].dtype)


def _log_normaliser(log_df: Tensor) -> Tensor:
    """Returns log Γ((ν+1)/2) − log Γ(ν/2) − ½ log(νπ) ``[D]``, computed in float64.

    The difference of the two large numbers is a series in 2/ν where ν is large.
    """
    log_a = log_df.double() - math.log(2)  # a = ν/2
    a = log_a.exp()
    few, many = a.clamp_max(_SERIES_FROM), a.clamp_min(_SERIES_FROM)
    by_gamma = torch.lgamma(few + 0.5) - torch.lgamma(few) - 0.5 * few.log()
    by_series = -1 / (8 * many) + 1 / (192 * many**3) - 1 / (640 * many**5)
    result = torch.where(a < _SERIES_FROM, by_gamma, by_series) - 0.5 * math.log(2 * math.pi)
    return result.to(log_df.dtype)
