"""Images of one kind of object at any angle and place, for tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIDE = 64


def objects(angles: Tensor, shifts: Tensor, seed: int = 0) -> Tensor:
    """Returns images, uint8 ``[n, 3, SIDE, SIDE]``, of a hammer with a stripe and a spot, each a little different.

    Args:
        angles: in degrees, clockwise, float64 ``[n]``.
        shifts: right of and below the middle, in halves of the side, ``[n, 2]``.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    at = (2 * torch.arange(SIDE, dtype=torch.float64) + 1) / SIDE - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    images = []
    for angle, (right, below) in zip(angles.tolist(), shifts.double().tolist(), strict=True):
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        # In the frame of the object, which is turned clockwise as rows go down.
        u, v = (x - right) * cos + (y - below) * sin, (y - below) * cos - (x - right) * sin
        handle = torch.sigmoid((0.10 - v.abs()) * 60) * torch.sigmoid((0.55 - (u - 0.05).abs()) * 60)
        head = torch.sigmoid((0.30 - (v - 0.04).abs()) * 60) * torch.sigmoid((0.10 - (u + 0.45).abs()) * 60)
        stripe = torch.sigmoid((0.04 - (u - 0.3).abs()) * 60) * handle
        image = 0.8 - 0.5 * handle - 0.6 * head + 0.4 * stripe
        colours = torch.stack([image, 0.9 * image, 0.8 * image])
        images.append(colours + 0.01 * torch.randn(3, SIDE, SIDE, generator=generator, dtype=torch.float64))
    return (255 * torch.stack(images)).round().clamp(0, 255).to(torch.uint8)
