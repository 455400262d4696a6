"""Mixtures of Gaussians."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fastmaf.bases.base import Base, check_count
from fastmaf.bases.gaussian import diagonal_log_prob


class GaussianMixture(Base):
    """A mixture of Gaussians with diagonal covariances, all trained, for data of several clusters::

        log p(z) = log Σ_k w[k] Π_d N(z[d]; loc[k, d], exp(log_scale[k, d])²),    w = softmax(logits)

    A sample is not differentiable with respect to the weights, as these choose a component: ``Flow.rsample`` refuses
    this base. ``sample`` chooses the component by one standard normal number g, the k at which the sum of w[0..k]
    first exceeds Φ(g). The dimensions are not independent: there is no ``nll_per_dim``.

    Args:
        features: D.
        components: number of components.
        generator: source of the means at the start, which are standard normal; None uses torch's global generator.
            Standard deviations start at 1, weights are equal.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> base = fastmaf.GaussianMixture(2, components=3)
        >>> flow = fastmaf.MAF(features=2, blocks=2, hidden_features=16, base=base)
        >>> flow.sample(5).shape
        torch.Size([5, 2])
    """

    has_rsample = False

    def __init__(
        self,
        features: int,
        components: int,
        *,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = check_count("features", features)
        self.components = check_count("components", components)
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        self.logits = nn.Parameter(torch.zeros(components, **make))
        self.loc = nn.Parameter(torch.empty(components, features, **make).normal_(generator=generator))
        self.log_scale = nn.Parameter(torch.zeros(components, features, **make))

    @property
    def noise_features(self) -> int:
        return self.features + 1

    def log_prob(self, z: Tensor) -> Tensor:
        of_components = diagonal_log_prob(z[:, None], self.loc, self.log_scale)
        return torch.logsumexp(self.logits.log_softmax(dim=0) + of_components, dim=1)

    def from_noise(self, noise: Tensor) -> Tensor:
        below = self.logits.double().softmax(dim=0).cumsum(dim=0)
        u = torch.special.ndtr(noise[:, 0].double())
        # The last sum may be rounded to less than 1.
        chosen = torch.searchsorted(below, u, right=True).clamp_max(self.components - 1)
        return torch.addcmul(self.loc[chosen], noise[:, 1:], self.log_scale[chosen].exp())

    def config(self) -> dict[str, Any]:
        return {"features": self.features, "components": self.components}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GaussianMixture:
        # The parameters are overwritten; a generator of its own leaves torch's global one unchanged.
        return cls(config["features"], config["components"], generator=Generator(), dtype=tensors["loc"].dtype)

    def extra_repr(self) -> str:
        return f"features={self.features}, components={self.components}"
