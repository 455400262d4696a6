"""The base class of invertible transforms: the steps that a flow is a sequence of.

``forward`` maps data towards the base distribution (x to z), ``inverse`` maps it back; both return the log absolute
determinant of their own Jacobian, in nats. A new transform subclasses ``Transform`` and is listed in
``fastmaf.transforms.TRANSFORMS``, which lets it be saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastmaf.kernels.autocast import outside_autocast


class NotInvertibleError(RuntimeError):
    """The inverse of a model was asked for that has none, such as one with the notebook's leaky output mask."""


class Transform(nn.Module):
    """An invertible map of ``[N, D]`` to ``[N, D]``.

    ``forward``, ``inverse`` and ``forward_per_dim`` of every subclass run without ambient ``torch.autocast``, and take
    bfloat16 and float16 inputs from within an autocast region in the transform's dtype. A conditioner that is to run in
    half precision enters ``torch.autocast`` itself.

    Attributes:
        features: D.
    """

    features: int

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("forward", "inverse", "forward_per_dim"):
            if name in vars(cls):
                setattr(cls, name, outside_autocast(vars(cls)[name]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``z`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dz/dx|."""
        raise NotImplementedError

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz|."""
        raise NotImplementedError

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``z`` and ``terms`` with each dimension's share of −ladj added, both in the frame of ``z``.

        Args:
            x: ``[N, D]``.
            terms: ``[N, D]``, what the transforms before this one contributed, in the frame of ``x``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say how its log-determinant is shared among the dimensions"
        )

    def config(self) -> dict[str, Any]:
        """Returns what ``from_config`` needs beside the tensors of ``state_dict``; plain JSON types."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Transform:
        """Builds the transform that ``config`` describes; ``tensors`` are then loaded into it as its state_dict."""
        raise NotImplementedError
