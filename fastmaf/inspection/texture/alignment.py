"""Whether images show the same thing at the same place, as objects do and textures do not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fastmaf.images.dataset import to_grey

ALIGNED = 0.25
"""From this share on, images are those of an object."""


@torch.no_grad()
def alignment(pixels: Tensor) -> float:
    """Returns the share of the fine structure of an image that the mean of the other images explains.

    With x_i image i minus its average over 3 x 3 pixels, and m_i the mean of the others::

        1 − Σ_i ‖x_i − m_i‖² / Σ_i ‖x_i‖²

    It is near 0 for textures, whose details are elsewhere in each image, also where all have the same light; objects
    in the same pose have most of their edges in common. Objects at any angle have a low share, too.

    Args:
        pixels: good images, uint8 ``[n, 3, s, s]``, n >= 2.

    Example:
        >>> import torch
        >>> from fastmaf.inspection.texture.alignment import alignment
        >>> same = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).repeat(8, 1, 1, 1)
        >>> alignment(same)
        1.0
    """
    n = len(pixels)
    total = torch.zeros(pixels.shape[2] - 2, pixels.shape[3] - 2, dtype=torch.float64)
    squares = 0.0
    for part in pixels.split(64):
        fine = _fine(part)
        total += fine.sum(dim=0)
        squares += float(fine.square().sum())
    if not squares:
        return 1.0
    # x - (total - x) / (n - 1) = (n x - total) / (n - 1), whose squares sum to the following over the images.
    residual = (n**2 * squares - n * float(total.square().sum())) / (n - 1) ** 2
    return 1.0 - max(residual, 0.0) / squares


def _fine(pixels: Tensor) -> Tensor:
    x = to_grey(pixels).double()
    return (x[:, :, 1:-1, 1:-1] - avg_pool2d(x, 3, stride=1))[:, 0]
