"""Reduction of square images, so that one reading of a file serves several sizes and shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaf.images.decode import resized


def reduced(pixels: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Reduces square RGB images as files are reduced: bilinear with antialiasing, in whole numbers; see ``resized``.

    An average of 2 x 2 pixels is sharper: more of the noise stays, in which synthetic defects are found less well.

    Args:
        pixels: uint8 ``[n, 3, s, s]``.
        size: side of the result, or its height and width; at most s.

    Returns:
        uint8 ``[n, 3, height, width]``; ``pixels`` itself if the size is the same.

    Raises:
        ValueError: the images have another type or are smaller.
    """
    side, shape = pixels.shape[-1], (size, size) if isinstance(size, int) else size
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, side, side) or not 1 <= min(shape) <= max(shape) <= side:
        expected = f"uint8 [n, 3, s, s] with s of at least {max(shape)}"
        raise ValueError(f"pixels must be {expected}; found {pixels.dtype} {list(pixels.shape)}")
    if shape == (side, side):
        return pixels
    small = [resized(image.permute(1, 2, 0).contiguous().cpu().numpy(), shape) for image in pixels]
    return torch.stack(small).to(pixels.device) if small else pixels.new_empty(0, 3, *shape)
