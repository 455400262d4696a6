"""Distances and scores of good images by the models of the folds that left them out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastmaf.inspection.features.gaussian import Folds
from fastmaf.inspection.features.maps import DistanceStatistics, image_scores
from fastmaf.inspection.out_of_fold import drop_fold


def restricted(folds: Sequence[np.ndarray], gaussians: Folds, index: np.ndarray) -> tuple[list[np.ndarray], Folds]:
    """Returns the folds of some of the images, renumbered, with their Gaussians."""
    kept = [(np.flatnonzero(np.isin(index, fold)), g) for fold, g in zip(folds, gaussians.folds, strict=True)]
    kept = [(fold, gaussian) for fold, gaussian in kept if len(fold)]
    return [fold for fold, _ in kept], gaussians._replace(folds=[gaussian for _, gaussian in kept])


def held_out_distances(x: Tensor, folds: Sequence[np.ndarray], gaussians: Folds) -> Tensor:
    """Returns the distances ``[n, L]`` of features ``[n, C, L]`` under the Gaussian without the fold of each image."""
    distances = x.new_empty(len(x), x.shape[2])
    for fold, gaussian in zip(folds, gaussians.folds, strict=True):
        distances[fold] = gaussian.distances(x[torch.from_numpy(fold)])
    return distances


def statistics(good: Tensor, folds: Sequence[np.ndarray]) -> list[DistanceStatistics]:
    """Returns the statistics of held-out distances over the other folds, for each."""
    return [DistanceStatistics.of(drop_fold(good, fold)) for fold in folds]


def scores(distances: Tensor, good: Tensor, folds: Sequence[np.ndarray]) -> np.ndarray:
    """Returns held-out scores, float64 ``[n]``."""
    result = np.empty(len(distances))
    for fold, others in zip(folds, statistics(good, folds), strict=True):
        result[fold] = image_scores(distances[fold], others).numpy()
    return result
