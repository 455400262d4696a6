"""Weights of 8 bits: a byte is a number of float8_e4m3fn, which times a power of two of its layer is the weight.

Such a weight is a tensor of bytes (uint8) and not of float8, for which torch has hardly any operations: its padding
can be cleared, and ``module.to(dtype)`` leaves it alone. The factor is exact wherever it is applied, to weights or to
sums, so that a layer is that of the rounded weights. One factor per layer is enough: 15 binary orders of magnitude are
normal numbers, and one per row gives the same errors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fastmaf.kernels.tensor_cache import cached

if TYPE_CHECKING:
    from fastmaf.kernels.affine_output.args import AffineArgs
    from fastmaf.kernels.masked_linear.args import LinearArgs

    Layer = TypeVar("Layer", LinearArgs, AffineArgs)

FLOAT8 = torch.float8_e4m3fn
BYTE = torch.uint8
_LARGEST = torch.finfo(FLOAT8).max
_LEAST_EXPONENT = -100  # of a factor: with the least float8 numbers it is still a normal float32


def encode(weight: Tensor) -> tuple[Tensor, float]:
    """Returns a weight as bytes, rounded to nearest, and their factor: the smallest power of two without overflow.

    Raises:
        ValueError: a weight is not finite.
    """
    weight = weight.detach()
    largest = 0.0 if weight.is_meta or not weight.numel() else float(weight.abs().max())
    if not math.isfinite(largest):
        raise ValueError(f"weights must be finite to be stored as {FLOAT8}; found {largest}")
    fraction, exponent = math.frexp(largest / _LARGEST)
    scale = math.ldexp(1.0, max(exponent - (fraction == 0.5), _LEAST_EXPONENT))
    return (weight / scale).to(FLOAT8).view(BYTE), scale


def is_factor(scale: float) -> bool:
    """Returns whether a number can be the factor of a layer's weights: a power of two that does not make them overflow
    or vanish.
    """
    return math.frexp(scale)[0] == 0.5 and math.ldexp(1.0, _LEAST_EXPONENT) <= scale <= math.ldexp(1.0, 119)


def decode(weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Returns a weight of any storage as ``dtype``; of bfloat16 or more bits, so that bytes lose nothing."""
    return weight.view(FLOAT8).to(dtype).mul_(scale) if weight.dtype == BYTE else weight.to(dtype)


def decoded(weight: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Returns a weight without bytes, for kernels that do not read them: as bfloat16 beside activations of float32.

    What is made of bytes is kept beside them until they are written to.
    """
    if weight.dtype != BYTE:
        return weight
    dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    known: list[object] = cached(weight, ("decoded", dtype), lambda: [None, None])
    state = None if weight.is_inference() else (weight._version, weight.data_ptr(), scale)
    if state is None or known[0] != state:
        with torch.inference_mode(False):
            known[:] = state, decode(weight.detach(), scale, dtype)
    assert isinstance(known[1], Tensor)
    return known[1]


def decoded_layer(args: Layer, dtype: torch.dtype) -> Layer:
    """Returns a layer with its weight ``decoded``."""
    return args._replace(weight=decoded(args.weight, args.weight_scale, dtype))
