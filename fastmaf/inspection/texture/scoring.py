"""From the NLL maps of an image to its score and its anomaly map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from fastmaf.inspection.texture.features import LEVELS
from fastmaf.inspection.texture.position import PositionStatistics

PARTS = 2 * LEVELS
"""The numbers that a score is made of: for each level as the map is, and relative to the image's median."""

_TOP = 0.005  # share of the locations of a level
_CLIP = 30.0  # standard deviations


def standardised(maps: Sequence[Tensor], positions: Sequence[PositionStatistics]) -> list[Tensor]:
    """Returns the NLL maps of an image's levels, standardised by position and averaged over 3 x 3 locations."""
    result = []
    for values, position in zip(maps, positions, strict=False):
        plain = position.standardise(values).clamp(-_CLIP, _CLIP)[None, None]
        result.append(avg_pool2d(plain, 3, stride=1, padding=1, count_include_pad=False)[0, 0])
    return result


def score_parts(maps: Sequence[Tensor]) -> np.ndarray:
    """Returns the mean of the highest values of each standardised map, float64 ``[PARTS]``, NaN for missing levels.

    The second half is relative to the median of the map: a whole image may be less likely because of its light, which
    would hide a defect; but a defect may also cover the image.
    """
    parts = np.full(PARTS, np.nan)
    for level, values in enumerate(maps):
        flat = values.flatten().double()
        top = float(flat.topk(max(1, round(_TOP * len(flat)))).values.mean())
        parts[level], parts[LEVELS + level] = top, top - float(flat.median())
    return parts


def combined(parts: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Returns scores of parts ``[n, PARTS]``: the mean of those there are, each standardised over good images."""
    with np.errstate(invalid="ignore"):
        scores: np.ndarray = np.nanmean((parts - mean) / deviation, axis=1)
    return scores


def part_statistics(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the parts of good images ``[n, PARTS]``; of unused levels 0 and 1."""
    used = ~np.isnan(parts).all(axis=0)
    mean, deviation = np.zeros(PARTS), np.ones(PARTS)
    mean[used], deviation[used] = np.nanmean(parts[:, used], axis=0), np.nanstd(parts[:, used], axis=0)
    return mean, np.where(deviation > 1e-9, deviation, 1.0)


def anomaly_map(maps: Sequence[Tensor], size: int) -> Tensor:
    """Returns the mean of the standardised maps, relative to their medians and at least 0, ``[size, size]``."""
    total = torch.zeros(size, size)
    for values in maps:
        relative = (values - values.median()).clamp_min(0)[None, None]
        total += interpolate(relative, (size, size), mode="bilinear", align_corners=False)[0, 0].cpu()
    return total / len(maps)
