"""A grid of overlapping tiles over square images, and the map of an image from those of its tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def tiled_size(size: int, tiles: int) -> int:
    """Returns the side of the images that a grid of tiles covers, in pixels; neighbours overlap by a quarter.

    Example:
        >>> tiled_size(64, 1), tiled_size(64, 4)
        (64, 208)
    """
    return size + (tiles - 1) * stride_of(size)


def stride_of(size: int) -> int:
    """Returns the distance of neighbouring tiles of this size."""
    return size - size // 4


def tile_of(images: Tensor, i: int, size: int, stride: int | None = None) -> Tensor:
    """Returns tile i of images ``[..., s, s]``, a copy."""
    stride = stride_of(size) if stride is None else stride
    tiles = (images.shape[-1] - size) // stride + 1
    row, column = (place * stride for place in divmod(i, tiles))
    return images[..., row : row + size, column : column + size].contiguous()


def tile_weights(size: int, tiles: int) -> np.ndarray:
    """Returns the share of each tile along a side in each pixel of the image, float64 ``[tiles, total]``.

    A tile's weight rises from its ends over the overlap; weights of a pixel are scaled to a sum of 1.
    """
    stride = stride_of(size)
    ramp = np.minimum(np.arange(size) + 0.5, size - np.arange(size) - 0.5)
    ramp = np.minimum(ramp / max(size - stride, 1), 1.0)
    weights = np.zeros((tiles, tiled_size(size, tiles)))
    for k in range(tiles):
        weights[k, k * stride : k * stride + size] = ramp
    return np.asarray(weights / weights.sum(axis=0))


def stitched(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the map of whole images from those of their tiles, float32 ``[n, t, t]`` each, row by row."""
    size, tiles = maps[0].shape[-1], round(len(maps) ** 0.5)
    stride, total, weights = stride_of(size), tiled_size(size, tiles), tile_weights(size, tiles)
    result = np.zeros((len(maps[0]), total, total), np.float32)
    for i, of_tile in enumerate(maps):
        row, column = divmod(i, tiles)
        rows, columns = (slice(k * stride, k * stride + size) for k in (row, column))
        share = np.outer(weights[row, rows], weights[column, columns]).astype(np.float32)
        result[:, rows, columns] += share * of_tile
    return result
