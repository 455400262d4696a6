"""The standard normal distribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmaf.bases.base import HALF_LOG_2PI, Base, check_count


class StandardNormal(Base):
    """The standard normal distribution, the default base of a flow::

        log p(z) = −½ Σ_d z[d]² − ½ D log 2π

    Blocks and base then run as one op.

    Args:
        features: D.

    Raises:
        ValueError: ``features`` is less than 1.

    Example:
        >>> fastmaf.StandardNormal(2).log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = check_count("features", features)

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(dim=1) - self.features * HALF_LOG_2PI

    def from_noise(self, noise: Tensor) -> Tensor:
        return noise

    def nll_per_dim(self, z: Tensor, terms: Tensor) -> Tensor:
        return terms + 0.5 * z.square() + HALF_LOG_2PI

    def config(self) -> dict[str, Any]:
        return {"features": self.features}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StandardNormal:
        return cls(config["features"])
