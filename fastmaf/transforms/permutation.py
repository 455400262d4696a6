"""Permutation of the dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastmaf.degrees import check_permutation
from fastmaf.kernels.flow.args import inverse_permutation
from fastmaf.transforms.base import Transform


class Permutation(Transform):
    """A permutation of the dimensions, z[k] = x[permutation[k]], with log-determinant 0.

    Args:
        permutation: integers ``[D]``, a permutation of 0..D−1.

    Raises:
        ValueError: ``permutation`` is not a permutation.

    Example:
        >>> permutation = fastmaf.Permutation(torch.tensor([2, 0, 1]))
        >>> permutation(torch.tensor([[10.0, 11.0, 12.0]]))[0]
        tensor([[12., 10., 11.]])
    """

    permutation: Tensor

    def __init__(self, permutation: Tensor | Sequence[int]) -> None:
        super().__init__()
        self.features = len(permutation)
        self._first = check_permutation("permutation", permutation, self.features)
        self.register_buffer("permutation", self._first.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.index_select(1, self.permutation), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z.index_select(1, self.inverse_permutation), z.new_zeros(z.shape[0])

    @property
    def inverse_permutation(self) -> Tensor:
        """The inverse permutation, int64 ``[D]``."""
        return inverse_permutation(self.permutation)

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        return x.index_select(1, self.permutation), terms.index_select(1, self.permutation)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Permutation:
        was_meta = self.permutation.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.permutation.is_meta:  # ``to_empty`` of a flow on the meta device
            self.permutation.copy_(self._first)
        return self

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Permutation:
        return cls(tensors["permutation"])

    def extra_repr(self) -> str:
        return f"features={self.features}"
