"""Mean and deviation of an NLL map by position: textures are often darker, or lit otherwise, near the border."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

GRID = 8
_PRIOR = 10.0  # images: a cell is drawn towards the mean of all cells as if so many had been average there


@dataclass
class PositionSums:
    """Sums over NLL maps of one level, from which ``PositionStatistics`` are computed; they can be added.

    Attributes:
        count: number of images.
        mean: sum over the images of the mean in each cell ``[GRID, GRID]``.
        square: likewise of the mean of squares.
    """

    count: int
    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, maps: Iterable[Tensor]) -> PositionSums:
        """Returns the sums of maps ``[h, w]`` of any sizes."""
        sums = cls(0, torch.zeros(GRID, GRID, dtype=torch.float64), torch.zeros(GRID, GRID, dtype=torch.float64))
        for values in maps:
            pair = torch.stack([values, values.square()]).double()
            mean, square = torch.nn.functional.adaptive_avg_pool2d(pair, GRID)
            sums.count, sums.mean, sums.square = sums.count + 1, sums.mean + mean, sums.square + square
        return sums

    def __add__(self, other: PositionSums) -> PositionSums:
        return PositionSums(self.count + other.count, self.mean + other.mean, self.square + other.square)

    def finished(self) -> PositionStatistics:
        """Returns the statistics; those of no map are the identity."""
        if not self.count:
            return PositionStatistics(torch.zeros(GRID, GRID), torch.ones(GRID, GRID))
        total = self.count + _PRIOR
        mean = (self.mean + _PRIOR * self.mean.mean() / self.count) / total
        square = (self.square + _PRIOR * self.square.mean() / self.count) / total
        deviation = (square - mean.square()).clamp_min(1e-6 * square.mean() + 1e-12).sqrt()
        return PositionStatistics(mean.float(), deviation.float())


@dataclass(frozen=True, eq=False)
class PositionStatistics:
    """Mean and standard deviation of an NLL map over good images, float32 ``[GRID, GRID]`` cells."""

    mean: Tensor
    deviation: Tensor

    def standardise(self, values: Tensor) -> Tensor:
        """Returns a map ``[h, w]``, minus the mean and over the deviation of its position, each interpolated."""
        cells = torch.stack([self.mean, self.deviation])[None]
        mean, deviation = interpolate(cells, values.shape, mode="bilinear", align_corners=False)[0]
        return (values - mean) / deviation
