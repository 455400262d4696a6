"""The logit transform of data in the unit interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmaf.transforms.base import Transform


class Logit(Transform):
    """The logit transform of data in (0, 1), such as dequantised pixels, to the real line::

        z = logit(a + (1 − 2a) x)

    The domain is 0 < a + (1 − 2a) x < 1. ``forward`` maps values outside of it to the z of the nearest number inside,
    with ``ladj`` −inf, so that ``log_prob`` of such a row is −inf. ``inverse`` maps every real z into the domain: where
    the sigmoid rounds to 0 or 1, to the nearest number inside.

    Args:
        features: D.
        alpha: a in [0, ½). A positive value includes x = 0 and x = 1 in the domain.

    Raises:
        ValueError: ``alpha`` is out of range.

    References:
        Dinh, Sohl-Dickstein and Bengio 2017, Density estimation using Real NVP, section 4.1.

    Example:
        >>> logit = fastmaf.Logit(features=3)
        >>> x = torch.tensor([[0.0, 0.5, 1.0]])
        >>> z, ladj = logit(x)
        >>> torch.allclose(logit.inverse(z)[0], x, atol=1e-6)
        True
    """

    def __init__(self, features: int, alpha: float = 0.05) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(f"alpha must lie in [0, 0.5); found {alpha}")
        self.features, self.alpha = features, float(alpha)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, terms = self.forward_per_dim(x, torch.zeros_like(x))
        return z, -terms.sum(dim=1)

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        p, numbers = self.alpha + (1 - 2 * self.alpha) * x, torch.finfo(x.dtype)
        outside = (p <= 0) | (p >= 1)
        p = torch.where(outside, p.clamp(numbers.tiny, 1 - numbers.eps / 2), p)
        terms = terms + p.log() + (-p).log1p() - math.log(1 - 2 * self.alpha)
        return torch.logit(p), terms.masked_fill(outside, math.inf)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # The margin keeps the rounding of x, and of forward, within (0, 1).
        numbers = torch.finfo(z.dtype)
        margin = 4 * numbers.eps if self.alpha else numbers.eps / 2
        p = torch.sigmoid(z).clamp(numbers.tiny + self.alpha * margin, 1 - margin)
        x = (p - self.alpha) / (1 - 2 * self.alpha)
        # The log of the sigmoid's derivative, which is symmetric, without the product of two small numbers.
        slopes = -z.abs() - 2 * torch.exp(-z.abs()).log1p()
        return x, slopes.sum(dim=1) - self.features * math.log(1 - 2 * self.alpha)

    def config(self) -> dict[str, Any]:
        return {"features": self.features, "alpha": self.alpha}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Logit:
        return cls(config["features"], config["alpha"])

    def extra_repr(self) -> str:
        return f"features={self.features}, alpha={self.alpha}"
