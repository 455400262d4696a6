"""A transform the other way round."""

from __future__ import annotations

from torch import Tensor

from fastmaf.transforms.base import Transform, given


class Inverted(Transform):
    """The inverse of a transform: of an autoregressive block, that of an inverse autoregressive flow::

        z = f⁻¹(x),    ladj = log |det df⁻¹/dx|

    Its ``inverse``, hence sampling, is one pass of the network; its ``forward``, hence the density, takes one step per
    level.

    Args:
        transform: f.

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
        self.features, self.transform = transform.features, transform

    @property
    def context_features(self) -> int:  # type: ignore[override]
        """The size of the transform's context, 0 for none."""
        return self.transform.context_features

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(x, *given(self.transform, context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.transform(z, *given(self.transform, context))
        return result
