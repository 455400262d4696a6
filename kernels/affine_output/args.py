"""The arguments of ``affine_output`` and of its backward pass, as its backends receive them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastmaf.kernels.affine_output.affine_map import AffineMap
from fastmaf.kernels.masked_linear.args import LinearArgs


class AffineArgs(NamedTuple):
    """The output layer of a MADE and the element-wise map that it parametrises.

    Attributes:
        weight: ``[numel]``, packed; rows ``2d`` and ``2d + 1`` give the shift and the raw log-scale of dimension ``d``.
        bias: ``[2D]``, interleaved in the same way.
        prefix: ``[2D]`` int64, how many hidden units each row sees; on the device of ``weight``.
        panels: ``PackedLayout.panels``, int64 ``[P + 1]``, on the CPU.
        map: the numbers of an ``AffineMap``.
        weight_scale: the factor of a weight that is bytes; see ``float8.py``.
    """

    weight: Tensor
    bias: Tensor
    prefix: Tensor
    panels: Tensor
    map: Sequence[float]
    weight_scale: float = 1.0

    @property
    def affine_map(self) -> AffineMap:
        """The element-wise map."""
        return AffineMap(*self.map)

    @property
    def linear(self) -> LinearArgs:
        """The layer of the product alone."""
        return LinearArgs(*self[:4], weight_scale=self.weight_scale)


AFFINE_SCHEMA = "Tensor weight, Tensor bias, Tensor prefix, Tensor panels, float[] map, float weight_scale"


class AffineBatch(NamedTuple):
    """The tensors of a backward pass that have the batch as their first dimension.

    Attributes:
        grad_z, grad_ladj, grad_log_scale: the gradients of the outputs.
        h: ``[N, H]``, the last hidden layer.
        z, log_scale: ``[N, D]``, the outputs.
        x: ``[N, D]``, the data; read only by maps of form SCALE_FIRST.
    """

    grad_z: Tensor
    grad_ladj: Tensor
    grad_log_scale: Tensor
    h: Tensor
    z: Tensor
    log_scale: Tensor
    x: Tensor
