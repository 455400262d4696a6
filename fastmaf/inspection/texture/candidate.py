"""Fitting a texture model to good images, with the models of the folds behind its statistics and its calibration.

The filters are shared by the folds: they are the principal components of patches of 5 x 5 pixels of all images, to
which one image adds next to nothing. Whitenings and blocks are fitted without each fold, on features of random
locations. Blocks are kept on a level if the features of the images that the first fold held out are more likely with
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import is_grey
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.interface import HeldOut
from fastmaf.inspection.model import Shapes
from fastmaf.inspection.scoring.float64_flow import rounded
from fastmaf.inspection.texture.density import fit_blocks, fit_whitening, nll, without_blocks
from fastmaf.inspection.texture.features import LEVELS, TextureFilters, to_texture
from fastmaf.inspection.texture.model import TextureModel, nll_maps
from fastmaf.inspection.texture.position import PositionStatistics, PositionSums
from fastmaf.inspection.texture.scoring import (
    anomaly_map,
    image_scores,
    part_statistics,
    relative_maps,
    score_parts,
)

NAME = "texture"
STAGES = 2
"""Calls of ``done`` besides one for each fold."""

_ROWS = 400_000  # features of a level that the densities are fitted to
_OF_IMAGE = 1500  # of one image, at most

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
    """

    fitted: TextureModel
    folds: Sequence[np.ndarray]
    flows: Sequence[Flows]
    sums: Sequence[Sequence[PositionSums]]
    shapes: Shapes | None

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
        return index, replace(self, folds=folds, shapes=shapes)

    @fastmaf.torch_defaults()
    def held_out(self, sets: Sequence[Tensor]) -> HeldOut:
        """Returns scores and anomaly maps of each image by the model of the fold that left it out.

        Args:
            sets: as in ``fastmaf.inspection.interface.Candidate``.
        """
        model = self.fitted
        of_sets = [self._parts_and_maps(images) for images in sets]
        scores = [image_scores(parts, model.mean, model.deviation) for parts, _ in of_sets]
        maps = np.stack([maps for _, maps in of_sets]) / np.float32(model.map_unit)
        return HeldOut(rounded(torch.from_numpy(np.stack(scores))).numpy(), maps)

    def _parts_and_maps(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return held_out_parts(self.fitted.filters, self.folds, self.flows, self.sums, images, self.shapes)


def held_out_parts(
    filters: TextureFilters,
    folds: Sequence[np.ndarray],
    flows: Sequence[Flows],
    sums: Sequence[Sequence[PositionSums]],
    images: Tensor,
    shapes: Shapes | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the parts of the score ``[n, LEVELS]`` and the anomaly map ``[n, s, s]`` of each image.

    Densities are those of the fold that left the image out, positions are standardised by the other folds.
    """
    size = images.shape[-1]
    parts, maps = np.empty((len(images), LEVELS)), np.empty((len(images), size, size), np.float32)
    for k, (fold, of_fold) in enumerate(zip(folds, flows, strict=True)):
        positions = finished([of_level for i, of_level in enumerate(sums) if i != k])
        for i in fold:
            levels = nll_maps(filters, of_fold, images[i], None if shapes is None else shapes[i])
            relative = relative_maps(levels, positions)
            parts[i], maps[i] = score_parts(relative), anomaly_map(relative, size).numpy()
    return parts, maps


def finished(sums: Sequence[Sequence[PositionSums]]) -> list[PositionStatistics]:
    """Returns the statistics of each level over several folds."""
    result = []
    for of_level in zip(*sums, strict=True):
        total = of_level[0]
        for other in of_level[1:]:
            total = total + other
        result.append(total.finished())
    return result


@fastmaf.torch_defaults()
def fit_texture(
    pixels: Tensor,
    folds: Sequence[np.ndarray],
    *,
    shapes: Shapes | None = None,
    false_alarm: float = 0.05,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> TextureCandidate:
    """Fits a texture model to good images.

    Args:
        pixels: uint8 ``[n, 3, s, s]``.
        folds: indices of the images of each fold.
        shapes: (height, width) of each image before it became square; None: all were square.
        false_alarm: the rate that the model is calibrated at.
        seed: of random locations and blocks.
        done: called after each of the ``len(folds) + STAGES`` stages.
    """
    size, channels = int(pixels.shape[-1]), 1 if is_grey(pixels) else 3

    def texture(i: int) -> Tensor:
        return to_texture(pixels[i], None if shapes is None else shapes[i], channels)

    filters = TextureFilters.fit([texture(i) for i in range(len(pixels))], seed=seed)
    rows, owner = _sampled(filters, [texture(i) for i in range(len(pixels))], seed)
    done()
    fold_of = np.empty(len(pixels), dtype=np.int64)
    for k, fold in enumerate(folds):
        fold_of[fold] = k
    # A level that few images are large enough for has no density; the first one they all have.
    levels = sum(2 * len(of_level.unique()) >= len(pixels) for of_level in owner)
    kept, figures = [False] * levels, dict[str, Any]()
    flows: list[Flows] = []
    for k in range(len(folds)):
        of_fold = []
        for level in range(levels):
            held = torch.from_numpy(fold_of[owner[level].numpy()] == k)
            flow = _fit(rows[level][~held], seed, blocks=k == 0 or kept[level])
            if k == 0:
                plain = without_blocks(flow.transforms[0])  # type: ignore[arg-type]
                values = [float(nll(f, rows[level][held]).double().mean()) for f in (plain, flow)]
                kept[level] = values[1] < values[0]  # False for NaN
                figures[f"level {level}"] = {"held_out_nll_of_whitening": values[0], "held_out_nll": values[1]}
                flow = flow if kept[level] else plain
            of_fold.append(flow)
        flows.append(tuple(of_fold))
        done()
    whole = tuple(_fit(rows[level], seed, blocks=kept[level]) for level in range(levels))
    sums = []
    total = 0.0
    for fold, without_fold in zip(folds, flows, strict=True):
        maps = [nll_maps(filters, without_fold, pixels[i], None if shapes is None else shapes[i]) for i in fold]
        total += sum(float(values.double().mean()) for of_image in maps for values in of_image)
        sums.append([PositionSums.of(m[level] for m in maps if level < len(m)) for level in range(levels)])
    parts, anomaly_maps = held_out_parts(filters, folds, flows, sums, pixels, shapes)
    mean, deviation = part_statistics(parts)
    unit = float(np.sqrt(np.square(anomaly_maps, dtype=np.float64).mean())) or 1.0
    scores = rounded(torch.from_numpy(image_scores(parts, mean, deviation))).numpy()
    anomaly_maps /= np.float32(unit)
    about = {
        "images": len(pixels),
        "images_of_folds": [len(fold) for fold in folds],
        "map_levels": [float(np.quantile(anomaly_maps, 0.99)), float(anomaly_maps.max())],
        "texture_nll": total / len(pixels),
        "texture_levels": figures,
        "texture_blocks": [f"level {level}" for level in range(levels) if kept[level]],
        "seed": seed,
    }
    calibration = Calibration(scores, false_alarm, None, "k-fold", len(folds))
    model = TextureModel(size, filters, whole, tuple(finished(sums)), mean, deviation, unit, calibration, about)
    done()
    return TextureCandidate(model, folds, flows, sums, shapes)


def _fit(rows: Tensor, seed: int, *, blocks: bool) -> fastmaf.Flow:
    whitening = fit_whitening(rows, seed)
    return fit_blocks(rows, whitening, seed) if blocks else without_blocks(whitening)


def _sampled(filters: TextureFilters, images: Sequence[Tensor], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Returns features of random locations of each level, and the image that each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[Tensor]] = [[] for _ in range(LEVELS)]
    owner: list[list[Tensor]] = [[] for _ in range(LEVELS)]
    of_image = max(1, min(_OF_IMAGE, _ROWS // len(images)))
    for i, image in enumerate(images):
        for level, features in enumerate(filters(image)):
            flat = features.flatten(1)
            index = torch.randperm(flat.shape[1], generator=generator)[:of_image]
            rows[level].append(flat[:, index].T)
            owner[level].append(torch.full((len(index),), i))
    return [torch.cat(part) if part else torch.empty(0, filters.features) for part in rows], [
        torch.cat(part) if part else torch.empty(0, dtype=torch.long) for part in owner
    ]
