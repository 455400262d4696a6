"""A transform the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmaf.transforms.base import Transform, given
from fastmaf.transforms.permutation import Permutation
from fastmaf.transforms.registry import transform_config, transform_from


class Inverted(Transform):
    """The inverse of a transform: of an autoregressive block, that of an inverse autoregressive flow::

        z = f⁻¹(x),    ladj = log |det df⁻¹/dx|

    Its ``inverse``, hence sampling, is one pass of the network; its ``forward``, hence the density, takes one step per
    level. Consecutive inverted affine blocks of a flow run as one op, as blocks do; see ``fastmaf.IAF``.

    Args:
        transform: f.

    Raises:
        TypeError: f is not a ``fastmaf.Transform``, or is inverted itself.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling 2016, Improving Variational Inference with Inverse
        Autoregressive Flow.

    Example:
        >>> block = fastmaf.AffineAutoregressive(fastmaf.MADE(features=3, hidden_features=16))
        >>> z, _ = fastmaf.Inverted(block)(torch.zeros(1, 3))
        >>> torch.allclose(block(z)[0], torch.zeros(1, 3), atol=1e-5)
        True
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        if not isinstance(transform, Transform) or isinstance(transform, Inverted):
            raise TypeError(f"expected a fastmaf.Transform that is not inverted; found {type(transform).__name__}")
        self.features, self.transform = transform.features, transform

    @property
    def context_features(self) -> int:  # type: ignore[override]
        """The size of the transform's context, 0 for none."""
        return self.transform.context_features

    @property
    def needs_eager(self) -> bool:
        """That of the transform."""
        return self.transform.needs_eager

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(x, *given(self.transform, context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.transform(z, *given(self.transform, context))
        return result

    def forward_per_dim(self, x: Tensor, terms: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        of = given(self.transform, context)
        z, _ = self.transform.inverse(x, *of)
        if isinstance(self.transform, Permutation):
            return z, self.transform.inverse(terms)[0]
        # The log-determinants of f and of its inverse are shared alike; f leaves each dimension in its place.
        _, of_transform = self.transform.forward_per_dim(z, torch.zeros_like(z), *of)
        return z, terms - of_transform

    def config(self) -> dict[str, Any]:
        return {"transform": transform_config(self.transform)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Inverted:
        own = "transform."
        return cls(transform_from(config["transform"], {key.removeprefix(own): t for key, t in tensors.items()}))
