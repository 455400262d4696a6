"""Ranking scores and anomaly maps on good images and synthetic defects, never on a test image.

Every good image is scored by the model of the fold that left it out, both as it is and with a synthetic defect. A
score is ranked by its image AUROC over both, averaged over the kinds of defects, so that every kind counts equally; a
map by the mean of its pixel AUROC and AU-PRO.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import to_unit
from fastmaf.images.progress import Progress
from fastmaf.inspection.out_of_fold import OutOfFoldModels
from fastmaf.inspection.scoring.float64_flow import FlowValues
from fastmaf.inspection.scoring.score import TermStatistics, anomaly_maps, residuals_of, terms_of
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings, Source
from fastmaf.inspection.synthetic_defects.draw import KINDS, SyntheticDefects, draw_defects
from fastmaf.metrics.aupro import au_pro, pixel_auroc
from fastmaf.metrics.auroc import auroc

_TERMS: tuple[tuple[Source, float], ...] = (("pixels", 0.0), ("pixels", 0.7), ("whitened", 0.0), ("flow", 0.0))

SCORES: tuple[ScoreSettings, ...] = (
    ScoreSettings("nll", "flow"),
    ScoreSettings("typicality", "flow"),
    *(
        ScoreSettings("map maximum", source, presmooth, sigma, clip)
        for (source, presmooth), sigma, clip in product(_TERMS, (1.0, 1.5, 2.0, 3.0), (5.0, 10.0, 20.0))
    ),
    *(
        ScoreSettings("map top", source, presmooth, sigma, 10.0, top)
        for (source, presmooth), sigma, top in product(_TERMS, (1.0, 1.5, 2.0), (0.0025, 0.005, 0.01, 0.02))
    ),
)
MAPS = tuple(
    AnomalyMapConfig(factors, power, sigma)
    for factors, power, sigma in product((50, 100, 150, 200, 400, 800), (0.0, 0.5, 1.0), (0.7, 1.0, 1.5, 2.0))
)

_TOGETHER = 2

_Config = TypeVar("_Config", ScoreSettings, AnomalyMapConfig)


class DrawnSets(NamedTuple):
    """Sets of images with a synthetic defect, and the good images followed by these on [0, 1]."""

    defects: list[SyntheticDefects]
    sets: list[Tensor]


@dataclass(frozen=True)
class ScoreCandidate:
    """A score with its AUROC by kind of defect, and their mean with its standard error."""

    settings: ScoreSettings
    by_kind: dict[str, float]
    image_auroc: float
    error: float


@dataclass(frozen=True)
class MapCandidate:
    """A configuration of the anomaly map, with its pixel AUROC and AU-PRO."""

    config: AnomalyMapConfig
    pixel_auroc: float
    au_pro: float

    @property
    def mean(self) -> float:
        """The mean of both, which decides."""
        return (self.pixel_auroc + self.au_pro) / 2


@fastmaf.torch_defaults()
def rank_scores(
    pixels: Tensor,
    models: OutOfFoldModels,
    *,
    candidates: Sequence[ScoreSettings] = SCORES,
    draws: int = 3,
    seed: int = 0,
    progress: bool = True,
    errors: bool = True,
    drawn_sets: DrawnSets | None = None,
) -> list[ScoreCandidate]:
    """Ranks scores on good images and synthetic defects.

    Args:
        pixels: the good images that ``models`` were fitted to, uint8 ``[n, 3, h, w]``.
        models: the models of the folds.
        candidates: the scores to compare.
        draws: synthetic defects per good image.
        seed: of the defects.
        progress: show a progress bar.
        errors: compute standard errors, by resampling; else they are NaN.
        drawn_sets: the result of ``draw_sets`` with these arguments, if it is known.

    Returns:
        The candidates, best first.
    """
    drawn, sets = drawn_sets or draw_sets(pixels, draws, seed, models.channels)
    kinds = np.concatenate([defects.kinds for defects in drawn])
    nll = torch.zeros(len(sets), len(pixels), dtype=torch.float64)
    if any(settings.needs_nll for settings in candidates):
        nll = models.held_out(sets, lambda values: values.nll)
    result: list[ScoreCandidate] = []
    references: list[TermStatistics] = []
    known: tuple[Any, ...] | None = None
    for settings, terms in _held_out(candidates, _terms_key, terms_of, models, sets, progress, models.shape):
        key = (_terms_key(settings), settings.reference, settings.needs_nll)
        if key != known:
            known, references = key, models.references(sets[0], terms[0], nll[0], settings)
        scores = models.scores(terms, nll, references, settings).flatten().numpy()
        normal, defect = scores[: len(pixels)], scores[len(pixels) :]
        by_kind = kind_aurocs(normal, defect, kinds)
        mean = float(np.mean(list(by_kind.values())))
        error = float(np.std(resampled_means(normal, defect, kinds))) if errors else math.nan
        result.append(ScoreCandidate(settings, by_kind, mean, error))
    return sorted(result, key=lambda candidate: -candidate.image_auroc)


@fastmaf.torch_defaults()
def rank_maps(
    pixels: Tensor,
    models: OutOfFoldModels,
    *,
    candidates: Sequence[AnomalyMapConfig] = MAPS,
    draws: int = 3,
    seed: int = 0,
    progress: bool = True,
    drawn_sets: DrawnSets | None = None,
) -> list[MapCandidate]:
    """Ranks map configurations by the pixels of good images and of synthetic defects; arguments as ``rank_scores``.

    Returns:
        The candidates, best first.
    """
    drawn, sets = drawn_sets or draw_sets(pixels, draws, seed, models.channels)
    masks = [*(None for _ in pixels), *(mask for defects in drawn for mask in defects.masks.numpy())]
    result = []
    for config, residuals in _held_out(candidates, _residuals_key, residuals_of, models, sets, progress):
        maps = list(anomaly_maps(residuals.flatten(0, 1), config, models.shape).numpy())
        result.append(MapCandidate(config, pixel_auroc(maps, masks), au_pro(maps, masks)))
    return sorted(result, key=lambda candidate: -candidate.mean)


def draw_sets(pixels: Tensor, draws: int, seed: int, channels: int = 3) -> DrawnSets:
    """Draws ``draws`` sets of images with a defect; values of the sets are of this many channels."""
    drawn = [draw_defects(pixels, seed=seed + i) for i in range(draws)]
    return DrawnSets(drawn, [to_unit(part, channels) for part in (pixels, *(defects.pixels for defects in drawn))])


def _terms_key(settings: ScoreSettings) -> tuple[str, float, float]:
    return settings.source, settings.presmooth_sigma, settings.level_power


def _residuals_key(config: AnomalyMapConfig) -> tuple[int, float]:
    return config.factors, config.power


def _held_out(
    candidates: Sequence[_Config],
    key: Callable[[_Config], Any],
    quantity: Callable[..., Tensor],
    models: OutOfFoldModels,
    sets: list[Tensor],
    progress: bool,
    *more: Any,
) -> Iterator[tuple[_Config, Tensor]]:
    """Yields each candidate with its held-out quantity, float32, which is the same for all with the same key.

    Two are computed together, and in memory at a time. ``more`` are further arguments of ``quantity``.
    """
    groups = [list(group) for _, group in groupby(sorted(candidates, key=key), key=key)]

    def of(config: _Config) -> Callable[[FlowValues], Tensor]:
        return lambda values: quantity(values, config, *more).float()

    with Progress("ranking", "candidate", total=len(candidates), show=progress) as bar:
        for start in range(0, len(groups), _TOGETHER):
            some = groups[start : start + _TOGETHER]
            for group, values in zip(some, models.held_out_each(sets, [of(group[0]) for group in some]), strict=True):
                for config in group:
                    yield config, values
                    bar.update()


def kind_aurocs(normal: np.ndarray, defect: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """Returns the image AUROC of the defects of each kind that there are.

    Args:
        normal: scores of good images ``[n]``.
        defect: scores of these with a defect, in the same order, once or more ``[draws n]``.
        kinds: of each defect.
    """
    return {kind: _auroc(normal, defect[kinds == kind]) for kind in KINDS if (kinds == kind).any()}


def _auroc(normal: np.ndarray, defect: np.ndarray) -> float:
    return auroc(np.concatenate([normal, defect]), np.arange(len(normal) + len(defect)) >= len(normal))


def resampled_means(normal: np.ndarray, defect: np.ndarray, kinds: np.ndarray, resamples: int = 200) -> np.ndarray:
    """Returns the mean over kinds of ``kind_aurocs`` for resamples of good images together with their defects.

    The resamples are the same for every score.
    """
    rng = np.random.default_rng(0)
    n, draws = len(normal), len(defect) // len(normal)
    means = []
    for _ in range(resamples):
        index = rng.integers(0, n, n)
        rows = (np.arange(draws)[:, None] * n + index).ravel()
        scores, of = defect[rows], kinds[rows]
        areas = [_auroc(normal[index], scores[of == kind]) for kind in np.unique(kinds) if (of == kind).any()]
        means.append(np.mean(areas))
    return np.array(means)
