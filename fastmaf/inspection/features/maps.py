"""From the distances of an image's features to one score and an anomaly map."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import interpolate

from fastmaf.inspection.scoring.float64_flow import rounded
from fastmaf.inspection.scoring.score import smoothing

TOP = 0.02
"""Share of the locations that a score averages."""

SIGMA = 1 / 64
"""Standard deviation of the Gaussian that smooths an anomaly map, as a share of its side."""

_LEAST = 0.1  # of the mean deviation: a smaller one is mostly noise


@dataclass(frozen=True, eq=False)
class DistanceStatistics:
    """Mean and standard deviation of the distance at each location ``[L]``, float64, over unseen good images."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, distances: Tensor) -> DistanceStatistics:
        """Returns the statistics of distances ``[n, L]``, n >= 2."""
        values = distances.double()
        deviation = values.std(dim=0)
        typical = float(deviation.mean()) or 1.0  # identical images do not vary
        return cls(values.mean(dim=0), deviation + _LEAST * typical)


def image_scores(distances: Tensor, statistics: DistanceStatistics) -> Tensor:
    """Returns one score per image, float64 ``[n]``: the mean of the largest standardised distances ``[n, L]``."""
    standard = (distances.double() - statistics.mean) / statistics.deviation
    return rounded(standard.topk(count_top(distances.shape[1]), dim=1).values.mean(dim=1))


def count_top(locations: int) -> int:
    """Returns the number of locations that a score averages."""
    return max(1, round(TOP * locations))


def anomaly_maps(
    distances: Tensor, statistics: DistanceStatistics, grid: tuple[int, int], side: int, unit: float
) -> Tensor:
    """Returns anomaly maps, float32 ``[n, side, side]``: distances ``[n, L]`` above their mean, enlarged and smoothed.

    They are negative where the features are more usual than those of most good images.

    Args:
        distances: of each location of the grid.
        statistics: of the distances of good images.
        grid: its rows and columns, L in total.
        side: of the maps.
        unit: that the maps are divided by.
    """
    above = (distances.double() - statistics.mean).float().view(-1, 1, *grid)
    large = interpolate(above, (side, side), mode="bilinear", align_corners=False)[:, 0]
    matrix = smoothing(side, SIGMA * side).to(large)
    return matrix @ large @ matrix.T / unit
