"""A fixed affine map of each dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaf.transforms.base import Transform


class ElementwiseAffine(Transform):
    """An affine map of each dimension on its own, such as a batch normalisation with fixed statistics::

        z[d] = exp(log_scale[d]) x[d] + shift[d],    ladj = Σ_d log_scale[d]

    Args:
        shift: ``[D]``.
        log_scale: ``[D]``, nats.

    Raises:
        ValueError: the two are no vectors of one length.

    Example:
        >>> transform = fastmaf.ElementwiseAffine(torch.zeros(3), torch.full((3,), 2.0).log())
        >>> transform(torch.ones(1, 3))[0].detach()
        tensor([[2., 2., 2.]])
    """

    def __init__(self, shift: Tensor, log_scale: Tensor) -> None:
        super().__init__()
        if shift.dim() != 1 or shift.shape != log_scale.shape:
            raise ValueError(
                f"shift and log_scale must be vectors of one length; found {list(shift.shape)}, {list(log_scale.shape)}"
            )
        self.features = len(shift)
        self.shift = nn.Parameter(shift.detach().clone())
        self.log_scale = nn.Parameter(log_scale.detach().clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addcmul(self.shift, x, self.log_scale.exp()), self.log_scale.sum().expand(x.shape[0])

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addcmul(self.shift, x, self.log_scale.exp()), terms - self.log_scale

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return (z - self.shift) * (-self.log_scale).exp(), (-self.log_scale.sum()).expand(z.shape[0])

    def config(self) -> dict[str, Any]:
        return {"features": self.features}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ElementwiseAffine:
        return cls(tensors["shift"], tensors["log_scale"])

    def extra_repr(self) -> str:
        return f"features={self.features}"
