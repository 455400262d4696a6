"""The texture models of all images and of the folds, as a candidate that a fit compares with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.interface import HeldOut, same_images
from fastmaf.inspection.model import Shapes
from fastmaf.inspection.scoring.float64_flow import rounded
from fastmaf.inspection.texture.features import LEVELS, TextureFilters
from fastmaf.inspection.texture.model import TextureModel, nll_maps
from fastmaf.inspection.texture.position import PositionStatistics, PositionSums
from fastmaf.inspection.texture.scoring import (
    anomaly_map,
    image_scores,
    relative_maps,
    score_parts,
)

NAME = "texture"
Flows = tuple[fastmaf.Flow, ...]


@dataclass(frozen=True, eq=False)
class TextureCandidate:
    """The texture models of all images and of the folds; see ``fastmaf.inspection.interface.Candidate``.

    Attributes:
        fitted: the model of all images, calibrated on held-out scores.
        folds: indices of the images of each fold.
        flows: the densities fitted without each fold.
        sums: of the NLL maps of each fold's images, for each level.
        shapes: (height, width) of each image before it became square; None: all were square.
        images: the good images.
        good: their held-out scores and maps, one set.
    """

    fitted: TextureModel
    folds: Sequence[np.ndarray]
    flows: Sequence[Flows]
    sums: Sequence[Sequence[PositionSums]]
    shapes: Shapes | None
    images: Tensor
    good: HeldOut

    @property
    def name(self) -> str:
        """For the report."""
        return NAME

    @property
    def size(self) -> int:
        """Side of the square images that ``held_out`` takes."""
        return self.fitted.size

    def model(self) -> TextureModel:
        """Returns the model of all images, calibrated on the held-out scores."""
        return self.fitted

    def subset(self, most: int, seed: int) -> tuple[np.ndarray, TextureCandidate]:
        """Returns at most so many images, as ``OutOfFoldModels.subset`` does, and the candidate of these."""
        n = sum(len(fold) for fold in self.folds)
        if n <= most:
            return np.arange(n), self
        index = np.sort(np.random.default_rng([seed, 2]).permutation(n)[:most])  # the same images for every candidate
        folds = [np.flatnonzero(np.isin(index, fold)) for fold in self.folds]
        shapes = None if self.shapes is None else [self.shapes[i] for i in index]
        good = HeldOut(self.good.scores[:, index], self.good.maps[:, index])
        images = self.images[torch.from_numpy(index)]
        return index, replace(self, folds=folds, shapes=shapes, images=images, good=good)

    @fastmaf.torch_defaults()
    def held_out(self, sets: Sequence[Tensor]) -> HeldOut:
        """Returns scores and anomaly maps of each image by the model of the fold that left it out.

        Those of the good images are known from the fit.

        Args:
            sets: as in ``fastmaf.inspection.interface.Candidate``.
        """
        results = [self._held_out(images) for images in sets]
        return HeldOut(*(np.concatenate(part) for part in zip(*results, strict=True)))

    def _held_out(self, images: Tensor) -> HeldOut:
        if same_images(images, self.images):
            return self.good
        model = self.fitted
        nlls = held_out_nlls(model.filters, self.folds, self.flows, images, self.shapes, model.longest)
        parts, maps = held_out_parts(nlls, self.folds, self.sums, model.map_size, model.filters.border)
        scores = rounded(torch.from_numpy(image_scores(parts, model.mean, model.deviation))).numpy()
        return HeldOut(scores[None], maps[None] / np.float32(model.map_unit))


def held_out_nlls(
    filters: TextureFilters,
    folds: Sequence[np.ndarray],
    flows: Sequence[Flows],
    images: Tensor,
    shapes: Shapes | None,
    longest: int,
) -> list[list[Tensor]]:
    """Returns the NLL maps of each image under the densities fitted without its fold."""
    fold_of = fold_of_each(folds, len(images))
    return [
        nll_maps(filters, flows[fold_of[i]], image, None if shapes is None else shapes[i], longest)
        for i, image in enumerate(images)
    ]


def held_out_parts(
    nlls: Sequence[Sequence[Tensor]],
    folds: Sequence[np.ndarray],
    sums: Sequence[Sequence[PositionSums]],
    size: int,
    border: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the parts of the score ``[n, LEVELS]`` and the anomaly map ``[n, size, size]`` of each image.

    Positions are standardised by the images of the other folds.

    Args:
        nlls: as ``held_out_nlls`` returns them.
        folds: indices of the images of each.
        sums: of the good images of each fold, for each level.
        size: side of the maps.
        border: as of ``anomaly_map``.
    """
    parts, maps = np.empty((len(nlls), LEVELS)), np.empty((len(nlls), size, size), np.float32)
    for k, fold in enumerate(folds):
        positions = finished([of_level for i, of_level in enumerate(sums) if i != k])
        for i in fold:
            relative = relative_maps(nlls[i], positions)
            parts[i], maps[i] = score_parts(relative), anomaly_map(relative, size, border).numpy()
    return parts, maps


def fold_of_each(folds: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Returns the fold of each of n images."""
    fold_of = np.empty(n, dtype=np.int64)
    for k, fold in enumerate(folds):
        fold_of[fold] = k
    return fold_of


def finished(sums: Sequence[Sequence[PositionSums]]) -> list[PositionStatistics]:
    """Returns the statistics of each level over several folds."""
    result = []
    for of_level in zip(*sums, strict=True):
        total = of_level[0]
        for other in of_level[1:]:
            total = total + other
        result.append(total.finished())
    return result
