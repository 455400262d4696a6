"""Gaussians with a diagonal covariance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmaf.bases.base import HALF_LOG_2PI, Base, check_count, vector_of


class DiagonalGaussian(Base):
    """A Gaussian with a diagonal covariance, with trained means and standard deviations::

        log p(z) = −Σ_d (½ ((z[d] − loc[d]) exp(−log_scale[d]))² + log_scale[d] + ½ log 2π)

    Args:
        features: D.
        loc: the means at the start, one number or ``[D]``.
        scale: the standard deviations at the start, one number or ``[D]``.
        trainable: whether they are parameters, or buffers that keep these values.
        device, dtype: of these.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> base = fastmaf.DiagonalGaussian(3, scale=2.0)
        >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16, base=base)
        >>> flow.sample(5).shape
        torch.Size([5, 3])
    """

    loc: Tensor
    log_scale: Tensor

    def __init__(
        self,
        features: int,
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
        log_scale = vector_of("scale", scale, features, like, positive=True).log()
        self._hold(trainable, loc=vector_of("loc", loc, features, like), log_scale=log_scale)

    def log_prob(self, z: Tensor) -> Tensor:
        return diagonal_log_prob(z, self.loc, self.log_scale)

    def from_noise(self, noise: Tensor) -> Tensor:
        return torch.addcmul(self.loc, noise, self.log_scale.exp())

    def nll_per_dim(self, z: Tensor, terms: Tensor) -> Tensor:
        y = (z - self.loc) * (-self.log_scale).exp()
        return terms + 0.5 * y.square() + (self.log_scale + HALF_LOG_2PI)

    def config(self) -> dict[str, Any]:
        return {"features": self.features, "trainable": self.trainable}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DiagonalGaussian:
        return cls(config["features"], trainable=config["trainable"], dtype=tensors["loc"].dtype)


def diagonal_log_prob(z: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Returns the log-density ``[...]`` of a diagonal Gaussian; the dimensions of all arguments are their last."""
    y = (z - loc) * (-log_scale).exp()
    return -0.5 * y.square().sum(dim=-1) - log_scale.sum(dim=-1) - z.shape[-1] * HALF_LOG_2PI
