"""Anomaly maps of other shapes: of the square in which images are read, or of the aspect ratio of the images."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate


def squared(maps: np.ndarray, size: int) -> np.ndarray:
    """Returns maps, float32 ``[n, h, w]``, brought bilinearly to ``[n, size, size]``, or as they are."""
    return brought_to(maps, (size, size))


def brought_to(maps: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Returns maps, float32 ``[n, h, w]``, resized bilinearly to another shape, or as they are."""
    if maps.shape[1:] == shape:
        return maps
    resized = interpolate(torch.from_numpy(maps)[:, None], shape, mode="bilinear", align_corners=False)
    return resized[:, 0].numpy()
