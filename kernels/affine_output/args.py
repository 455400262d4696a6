"""The arguments of ``affine_output`` and of its backward pass, as its backends receive them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AffineArgs(NamedTuple):
    """The output layer of a MADE and the bound of its log-scales.

    Attributes:
        weight: ``[numel]``, packed; rows ``2d`` and ``2d + 1`` give the shift and the raw log-scale of dimension ``d``.
        bias: ``[2D]``, interleaved in the same way.
        prefix: ``[2D]`` int64, how many hidden units each row sees; on the device of ``weight``.
        tiles: ``PackedLayout.table``, int32 ``[T, 4]``, on the CPU.
        bound: log-scales stay within ``±bound``; ``inf`` leaves them free.
        soft: bound by ``bound * tanh(u / bound)`` instead of by a clamp.
    """

    weight: Tensor
    bias: Tensor
    prefix: Tensor
    tiles: Tensor
    bound: float
    soft: bool


AFFINE_SCHEMA = "Tensor weight, Tensor bias, Tensor prefix, Tensor tiles, float bound, bool soft"


class AffineBatch(NamedTuple):
    """The tensors of a backward pass that have the batch as their first dimension.

    Attributes:
        grad_z, grad_ladj, grad_log_scale: the gradients of the outputs.
        h: ``[N, H]``, the last hidden layer.
        z, log_scale: ``[N, D]``, the outputs.
    """

    grad_z: Tensor
    grad_ladj: Tensor
    grad_log_scale: Tensor
    h: Tensor
    z: Tensor
    log_scale: Tensor
