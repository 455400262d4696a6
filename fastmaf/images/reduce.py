"""Reduction of square images by exact averages over areas, so that one reading of a file serves several sizes."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

_BATCH = 64
_EXACT_IN_FLOAT32 = 256  # sides up to this: weighted sums are whole numbers below 2^24


def reduced(pixels: Tensor, size: int) -> Tensor:
    """Reduces square images: each new pixel is the mean over the square that it covers, rounded half up.

    Where the side is a multiple of ``size``, that is a mean of whole pixels (2 x 2, 3 x 3, ...). Otherwise pixels on
    the edge of a square count by the share of them that lies within. Sums are of whole numbers and exact, so that the
    result is the same on every processor and in every batch.

    Args:
        pixels: uint8 ``[..., s, s]``.
        size: side of the result, at most s.

    Returns:
        uint8 ``[..., size, size]``; ``pixels`` itself if the size is the same.

    Raises:
        ValueError: the images have another type or are smaller.

    Example:
        >>> import torch
        >>> from fastmaf.images.reduce import reduced
        >>> reduced(torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8), 1)
        tensor([[2]], dtype=torch.uint8)
    """
    side = pixels.shape[-1]
    if pixels.dtype != torch.uint8 or pixels.ndim < 2 or pixels.shape[-2] != side or not 1 <= size <= side:
        expected = f"uint8 [..., s, s] with s of at least {size}"
        raise ValueError(f"pixels must be {expected}; found {pixels.dtype} {list(pixels.shape)}")
    if size == side:
        return pixels
    weights, total = area_weights(side, size)
    weights = weights.to(pixels.device, torch.float32 if side <= _EXACT_IN_FLOAT32 else torch.float64)
    planes = pixels.reshape(-1, side, side)
    result = torch.empty(len(planes), size, size, dtype=torch.uint8, device=pixels.device)
    for part, into in zip(planes.split(_BATCH), result.split(_BATCH), strict=True):
        sums = (weights @ part.to(weights.dtype) @ weights.T).long()
        into.copy_((2 * sums + total).div(2 * total, rounding_mode="floor"))
    return result.view(*pixels.shape[:-2], size, size)


def area_weights(side: int, size: int) -> tuple[Tensor, int]:
    """Returns the weights of ``side`` pixels in ``size`` larger ones, whole numbers ``[size, side]``, and their unit.

    The mean over the area of a new pixel of an image X is the entry of W X Wᵀ over the unit.
    """
    ratio = Fraction(side, size)
    edges = torch.arange(size + 1) * ratio.numerator  # in units of 1 / denominator of a pixel
    pixels = torch.arange(side + 1) * ratio.denominator
    upper = torch.minimum(edges[1:, None], pixels[1:])
    lower = torch.maximum(edges[:-1, None], pixels[:-1])
    return (upper - lower).clamp_min(0), ratio.numerator**2
