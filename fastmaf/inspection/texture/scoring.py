"""From the NLL maps of an image to its score and its anomaly map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from fastmaf.inspection.texture.features import LEVELS, LONGEST, STRIDE
from fastmaf.inspection.texture.position import PositionStatistics

_WINDOW = LONGEST // STRIDE  # locations of the first level along each side
_TOP = 0.005  # share of the locations of a level
_CLIP = 30.0  # standard deviations


def relative_maps(maps: Sequence[Tensor], positions: Sequence[PositionStatistics]) -> list[Tensor]:
    """Returns the NLL maps of an image's levels, standardised by position, smoothed, and minus their medians.

    The smoothing is an average over 3 x 3 locations. Under other light a whole image is less likely, which would hide a
    defect of another one: only what stands out from its own image counts.
    """
    result = []
    for values, position in zip(maps, positions, strict=False):
        plain = position.standardise(values).clamp(-_CLIP, _CLIP)[None, None]
        smooth = avg_pool2d(plain, 3, stride=1, padding=1, count_include_pad=False)[0, 0]
        result.append(smooth - smooth.median())
    return result


def score_parts(maps: Sequence[Tensor]) -> np.ndarray:
    """Returns the mean of the highest values of each relative map, float64 ``[LEVELS]``, NaN for missing levels.

    Of a map that is larger than that of an image of ``LONGEST`` pixels, it is the largest of overlapping windows of
    that size, so that a defect counts as much in a larger image.
    """
    parts = np.full(LEVELS, np.nan)
    for level, values in enumerate(maps):
        side = _WINDOW >> level
        (rows, down), (columns, across) = (_windows(length, side) for length in values.shape)
        parts[level] = max(
            _highest(values[row : row + down, column : column + across]) for row in rows for column in columns
        )
    return parts


def _windows(length: int, side: int) -> tuple[list[int], int]:
    """Returns the first locations of windows that overlap by half or more, and their length, at most ``side``."""
    if length <= side:
        return [0], length
    count = -(-2 * (length - side) // side) + 1
    return [k * (length - side) // (count - 1) for k in range(count)], side


def _highest(values: Tensor) -> float:
    flat = values.flatten().double()
    return float(flat.topk(max(1, round(_TOP * len(flat)))).values.mean())


def part_statistics(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the parts of good images ``[n, LEVELS]``; 0 and 1 of unused levels."""
    mean, deviation = np.zeros(LEVELS), np.ones(LEVELS)
    used = ~np.isnan(parts).all(axis=0)
    mean[used], spread = np.nanmean(parts[:, used], axis=0), np.nanstd(parts[:, used], axis=0)
    deviation[used] = np.where(spread > 1e-9, spread, 1.0)
    return mean, deviation


def image_scores(parts: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Returns scores of parts ``[n, LEVELS]``: the mean of those there are, each standardised over good images."""
    scores: np.ndarray = np.nanmean((parts - mean) / deviation, axis=1)
    return scores


def anomaly_map(maps: Sequence[Tensor], size: int, border: int) -> Tensor:
    """Returns the mean over the levels of what is positive in the relative maps, ``[size, size]``.

    Maps lack ``border`` locations along each side. These count as their nearest location does: 0 would rank a defect
    that reaches the edge below everything else.
    """
    total = torch.zeros(size, size)
    for values in maps:
        positive = pad(values.clamp_min(0)[None, None], (border,) * 4, mode="replicate")
        total += interpolate(positive, (size, size), mode="bilinear", align_corners=False)[0, 0].cpu()
    return total / len(maps)
