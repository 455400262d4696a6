"""Fitting a Gaussian of features to good images, as a candidate that a fit compares with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.progress import Progress
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.features.conditional import with_maf
from fastmaf.inspection.features.extractor import Extractor, on_grid
from fastmaf.inspection.features.gaussian import Folds, fit_gaussians
from fastmaf.inspection.features.held_out import held_out_distances, restricted, scores, statistics
from fastmaf.inspection.features.maps import DistanceStatistics, anomaly_maps, image_scores
from fastmaf.inspection.features.model import FeatureModel
from fastmaf.inspection.interface import HeldOut, same_images
from fastmaf.inspection.out_of_fold import group_folds, k_fold
from fastmaf.inspection.selection.drawn_auroc import kind_aurocs
from fastmaf.inspection.synthetic_defects.draw import SyntheticDefects

FOLDS = 10
"""Number of folds: each costs little, and the more there are, the less their models differ from that of all images."""

FALSE_ALARM = 0.05
PER_LOCATION, POOLED, MAF = "per location", "for all locations", "then a MAF"
_BATCH = 64
_MAP_SIDE = 64  # of the anomaly maps of features that were computed elsewhere


@dataclass(frozen=True, eq=False)
class FeatureCandidate:
    """Gaussians of features, of all images and of the folds; see ``fastmaf.inspection.interface.Candidate``.

    Attributes:
        extractor: from images to features.
        folds: indices of the images of each.
        gaussians: fitted without each fold, and to all images.
        grid: rows and columns of locations.
        good: held-out distances of the good images ``[n, L]``.
        map_unit: of the model.
        figures: for the model's record.
        known: sets of images with their features, which are not computed again.
    """

    extractor: Extractor
    folds: Sequence[np.ndarray]
    gaussians: Folds
    grid: tuple[int, int]
    good: Tensor
    map_unit: float
    figures: dict[str, Any]
    known: Sequence[tuple[Tensor, Tensor]] = ()

    @property
    def name(self) -> str:
        """For the report."""
        return self.extractor.label

    @property
    def size(self) -> int:
        """Side of the square images that ``held_out`` takes."""
        return self.extractor.size

    @fastmaf.torch_defaults()
    def held_out(self, sets: Sequence[Tensor]) -> HeldOut:
        """Returns scores and anomaly maps of each image by the model of the fold that left it out.

        Distances of a fold are standardised by their statistics over the other folds.

        Args:
            sets: as in ``fastmaf.inspection.interface.Candidate``.
        """
        shape = len(sets), len(sets[0])
        values, maps = np.empty(shape), np.empty((*shape, self.size, self.size), np.float32)
        for i, images in enumerate(sets):
            features = next((x for known, x in self.known if same_images(known, images)), None)
            distances = held_out_distances(
                self._features(images) if features is None else features, self.folds, self.gaussians
            )
            for fold, others in zip(self.folds, statistics(self.good, self.folds), strict=True):
                values[i, fold] = image_scores(distances[fold], others).numpy()
                for index in np.array_split(fold, -(-len(fold) // _BATCH)):
                    maps[i, index] = anomaly_maps(distances[index], others, self.grid, self.size, self.map_unit).numpy()
        return HeldOut(values, maps)

    def subset(self, index: np.ndarray, images: Tensor) -> FeatureCandidate:
        """Returns the candidate for some of the good images, which are given, too."""
        if len(index) == len(self.good):
            return self
        folds, gaussians = restricted(self.folds, self.gaussians, index)
        known = [(images, self.known[0][1][torch.from_numpy(index)]), *self.known[1:]]
        return replace(self, folds=folds, gaussians=gaussians, good=self.good[index], known=known)

    def model(self) -> FeatureModel:
        """Returns the model of all images, calibrated on the held-out scores."""
        calibration = Calibration(
            scores(self.good, self.good, self.folds), FALSE_ALARM, None, "k-fold", len(self.folds)
        )
        usual = DistanceStatistics.of(self.good)
        return FeatureModel(
            self.extractor, self.gaussians.whole, self.grid, usual, self.map_unit, calibration, dict(self.figures)
        )

    def _features(self, images: Tensor) -> Tensor:
        return self.extractor(images).flatten(2)


@fastmaf.torch_defaults()
def fit_features(
    pixels: Tensor,
    extractor: Extractor,
    *,
    drawn: Sequence[SyntheticDefects] = (),
    index: np.ndarray | None = None,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FeatureCandidate:
    """Fits Gaussians of features to good images.

    A Gaussian for each location suits objects in a fixed position; one for all locations suits textures. The one with
    the higher image AUROC on synthetic defects is taken, both on held-out images; the first if there are no defects.

    Args:
        pixels: good images, uint8 ``[n, 3, size, size]`` of the extractor's size, n >= 3.
        extractor: from images to features.
        drawn: the same images with a synthetic defect, once or more.
        index: which of the images they are drawn onto; None: all.
        groups: the group of each image; folds then hold out whole groups. None: folds are random.
        seed: of the folds.
        progress: show a progress bar.

    Raises:
        ValueError: the network does not return feature maps, or there are too few images or groups.
    """
    sets = [pixels, *(defects.pixels for defects in drawn)]
    n, index = len(pixels), np.arange(len(pixels)) if index is None else index
    folds = _folds(n, groups, seed)
    known, grid = [], (0, 0)
    with Progress("computing features", "image", total=sum(map(len, sets)), show=progress) as bar:
        for images in sets:
            parts = []
            for image in images:
                parts.append(extractor(image[None]))
                bar.update()
            features = torch.cat(parts)
            grid = (features.shape[2], features.shape[3])
            known.append((images, features.flatten(2)))
    kinds = np.concatenate([defects.kinds for defects in drawn]) if drawn else np.empty(0, str)
    return _fitted(extractor, known, kinds, folds, grid, index, seed)


@fastmaf.torch_defaults()
def fit_precomputed(maps: Any, *, groups: Sequence[str] | None = None, seed: int = 0) -> FeatureCandidate:
    """Fits Gaussians to feature maps that were computed elsewhere, as ``fastmaf.inspection.features.extractor.Maps``.

    Whether there is one for each location or one for all is decided by the likelihood of held-out images.

    Raises:
        ValueError: they are something else, or of fewer than 3 images.
    """
    features = on_grid(maps)
    if len(features) < 3:
        raise ValueError(f"features must be of at least 3 good images; found {len(features)}")
    grid = (features.shape[2], features.shape[3])
    known, folds = [(features, features.flatten(2))], _folds(len(features), groups, seed)
    return _fitted(
        Extractor(None, None, _MAP_SIDE), known, np.empty(0, str), folds, grid, np.arange(len(features)), seed
    )


def _folds(n: int, groups: Sequence[str] | None, seed: int) -> list[np.ndarray]:
    if groups is None:
        return k_fold(n, min(FOLDS, n), seed)
    if len(groups) != n:
        raise ValueError(f"groups must name the group of each of {n} images; found {len(groups)}")
    return group_folds(groups, FOLDS)


def _fitted(
    extractor: Extractor,
    known: list[tuple[Tensor, Tensor]],
    kinds: np.ndarray,
    folds: Sequence[np.ndarray],
    grid: tuple[int, int],
    index: np.ndarray,
    seed: int,
) -> FeatureCandidate:
    """Returns the best candidate of a Gaussian per location, one for all, and the latter with a MAF.

    A Gaussian per location knows the position already: a MAF lowers its NLL by a few percent, and takes as long as all
    the rest.
    """
    x, found = known[0][1], dict[str, tuple[Folds, Tensor]]()
    drawn_aurocs, nlls = dict[str, float](), dict[str, list[Tensor]]()

    def compare(kind: str, gaussians: Folds) -> None:
        good = held_out_distances(x, folds, gaussians)
        some_folds, some_gaussians = restricted(folds, gaussians, index)
        defects = [held_out_distances(features, some_folds, some_gaussians) for _, features in known[1:]]
        found[kind] = gaussians, good
        nlls[kind] = [gaussian.nll(good[fold]) for gaussian, fold in zip(gaussians.folds, folds, strict=True)]
        if defects:
            of_good, *others = [scores(part, good[index], some_folds) for part in (good[index], *defects)]
            drawn_aurocs[kind] = float(np.mean(list(kind_aurocs(of_good, np.concatenate(others), kinds).values())))

    def best() -> str:
        if drawn_aurocs:
            return max(drawn_aurocs, key=lambda kind: drawn_aurocs[kind])
        return min(nlls, key=lambda kind: float(torch.cat(nlls[kind]).mean()))

    for kind in (PER_LOCATION, POOLED):
        compare(kind, fit_gaussians(x, folds, pooled=kind == POOLED))
    chosen = best()
    if chosen == POOLED and (densities := with_maf(x, folds, found[chosen][0], grid, seed)) is not None:
        compare(f"{chosen}, {MAF}", densities)
        chosen = best()
    gaussians, good = found[chosen]
    maps = np.empty((len(good), extractor.size, extractor.size), np.float32)
    for fold, others in zip(folds, statistics(good, folds), strict=True):
        maps[fold] = anomaly_maps(good[fold], others, grid, extractor.size, 1.0).numpy()
    unit = float(np.sqrt(np.square(maps, dtype=np.float64).mean())) or 1.0
    figures: dict[str, Any] = {
        "images": len(good),
        "images_of_folds": [len(fold) for fold in folds],
        "held_out_nll_of_folds": [float(of_fold.mean()) for of_fold in nlls[chosen]],
        "map_levels": [max(0.0, float(level)) for level in (np.quantile(maps, 0.99) / unit, maps.max() / unit)],
        "features": {
            "network": extractor.label,
            "channels": known[0][1].shape[1],
            "grid": list(grid),
            "gaussian": chosen,
            "shrinkage": gaussians.shrinkage,
        },
        "drawn_auroc_of_gaussians": drawn_aurocs,
        "held_out_nll_of_gaussians": {kind: float(torch.cat(of_folds).mean()) for kind, of_folds in nlls.items()},
    }
    return FeatureCandidate(extractor, folds, gaussians, grid, good, unit, figures, known)
