"""Baselines of images in tiles, so that they see as much detail as a tiled model."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
from torch import Tensor

from fastmaf.images.reduce import reduced
from fastmaf.inspection.baselines import Baseline
from fastmaf.inspection.map_shapes import squared
from fastmaf.inspection.tiles import stitched, tile_of

LARGEST = 128
"""Side of images that a baseline is fitted to, at most: principal components of larger ones need too much memory."""

_FEWEST = 4  # good images of which each half can be scored without it


def small_enough(pixels: Tensor) -> Tensor:
    """Returns images, uint8 ``[n, 3, s, s]``, of at most ``LARGEST`` pixels a side."""
    return reduced(pixels, min(int(pixels.shape[-1]), LARGEST))


class TiledBaseline:
    """A baseline for each tile of a grid over square images.

    The score of an image is the highest of its tiles' scores, standardised as those of a ``TiledModel``: by the mean
    and the deviation of the scores of good images, here of each half by a baseline fitted to the other one.

    Args:
        baseline: not fitted.
        size: of the tiles in pixels.
        tiles: number of tiles along each side.
    """

    def __init__(self, baseline: Baseline, size: int, tiles: int) -> None:
        self.name, self._size, self._parts = baseline.name, size, [deepcopy(baseline) for _ in range(tiles**2)]

    def fit(self, pixels: Tensor) -> TiledBaseline:
        """Fits to good images, uint8 ``[n, 3, s, s]`` with s = ``tiled_size(size, tiles)``, n >= 2; returns itself."""
        self._standards = []
        for i, part in enumerate(self._parts):
            tile = small_enough(tile_of(pixels, i, self._size))
            halves = [tile[::2], tile[1::2]] if len(tile) >= _FEWEST else [tile, tile]
            found = [part.fit(one).score(other)[0] for one, other in (halves, halves[::-1])]
            scores = np.concatenate(found)
            self._standards.append((scores.mean(), scores.std() or 1.0))
            part.fit(tile)
        return self

    def score(self, pixels: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns anomaly scores, float64 ``[n]``, and anomaly maps, float32 ``[n, s, s]``, or None without maps."""
        scores, maps = [], []
        for i, (part, (mean, deviation)) in enumerate(zip(self._parts, self._standards, strict=True)):
            of_tile, own_maps = part.score(small_enough(tile_of(pixels, i, self._size)))
            scores.append((of_tile - mean) / deviation)
            maps += [] if own_maps is None else [squared(own_maps, self._size)]
        return np.max(scores, axis=0), stitched(maps) if maps else None
