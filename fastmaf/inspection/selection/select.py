"""Selecting the score and the anomaly map of a fit on synthetic defects.

Objects that lie at any angle need another score and another map than aligned ones: neighbouring residuals share their
sign, and every factor is needed; see ``Recipe``. The first candidate is kept unless another is better beyond chance.
Likewise, the score of a baseline is taken where it is better than the whitening's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaf.inspection.held_out_terms import HeldOutTerms
from fastmaf.inspection.out_of_fold import OutOfFoldModels
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, Reference, ScoreSettings
from fastmaf.inspection.selection.baselines import BaselineModel, better_baseline
from fastmaf.inspection.selection.ranking import MapCandidate, ScoreCandidate, draw_sets, rank_maps, rank_scores

REFERENCES: tuple[Reference, ...] = ("training", "held-out")
SCORE_CANDIDATES = (ScoreSettings(), ScoreSettings(presmooth_sigma=0.7))
MAP_CANDIDATES = (AnomalyMapConfig(), AnomalyMapConfig(factors=400))

_SIDE = 64  # of the images that widths in pixels are for; wider in larger images, whose neighbours are more alike
_IMAGES = 500  # that defects are drawn onto, at most: more would take time and memory, and change little
_STANDARD_ERRORS = 2.0  # another score must be better by this many standard errors of the first one's mean AUROC
_GAIN = 0.01  # another map must be better by this much in the mean of pixel AUROC and AU-PRO


class Selected(NamedTuple):
    """What a fit selected.

    Attributes:
        score, map_config: of the recipe, or the selected ones.
        baseline: whose score is better, if any.
        figures: of the candidates.
        known: held-out terms and maps of all good images for this score and map, if they were evaluated.
    """

    score: ScoreSettings
    map_config: AnomalyMapConfig
    baseline: BaselineModel | None
    figures: dict[str, Any]
    known: HeldOutTerms | None


def select_score_and_map(recipe: Recipe, pixels: Tensor, models: OutOfFoldModels) -> Selected:
    """Selects the score and the map of a recipe where it leaves them open.

    Args:
        recipe: as fitted.
        pixels: the good images, uint8 ``[n, 3, h, w]``.
        models: the models of the folds.
    """
    figures: dict[str, Any] = {}
    baseline: BaselineModel | None = None
    of_scores, of_maps = score_candidates(recipe.size), map_candidates(recipe.size)
    score, map_config = recipe.score, recipe.map_config
    options: dict[str, Any] = {"progress": False}
    all_pixels, all_models, known = pixels, models, None
    if score is None or map_config is None:
        index, models = all_models.subset(_IMAGES, recipe.seed)
        pixels = all_pixels[torch.from_numpy(index)]
        options["drawn_sets"] = draw_sets(pixels, 1, recipe.seed, models.channels)
        wanted = of_scores if score is None else (), of_maps if map_config is None else ()
        known = options["known"] = HeldOutTerms.of(models, options["drawn_sets"].sets, *wanted)
    if score is None:
        references = [replace(of_scores[0], reference=reference) for reference in REFERENCES]
        scores = rank_scores(pixels, models, candidates=references, **options)
        figures["drawn_auroc_of_references"] = {c.settings.reference: c.image_auroc for c in scores}
        of_scores = tuple(replace(other, reference=scores[0].settings.reference) for other in of_scores)
        scores = [scores[0], *rank_scores(pixels, models, candidates=of_scores[1:], **options)]
        score = select_score(scores, of_scores[0])
        aurocs = {candidate.settings: candidate.image_auroc for candidate in scores}
        figures["drawn_auroc"] = {f"presmooth {s.presmooth_sigma:g}": aurocs[s] for s in of_scores}
        chosen = next(candidate for candidate in scores if candidate.settings == score)
        margin = _STANDARD_ERRORS * chosen.error
        baseline, figures["drawn_auroc_of_baselines"] = better_baseline(
            pixels, models, chosen, margin, options["drawn_sets"]
        )
        if baseline is not None and models is not all_models:
            baseline = baseline.refitted(all_pixels, all_models)
        figures["baseline"] = None if baseline is None else baseline.name
    if map_config is None:
        maps = rank_maps(pixels, models, candidates=of_maps, **options)
        map_config = select_map(maps, of_maps[0])
        means = {candidate.config: candidate.mean for candidate in maps}
        figures["drawn_maps"] = {f"{config.factors} factors": means[config] for config in of_maps}
    if recipe.score is not None or recipe.map_config is not None or baseline is not None or models is not all_models:
        known = None
    return Selected(score, map_config, baseline, figures, known)


def select_score(ranked: Sequence[ScoreCandidate], default: ScoreSettings = SCORE_CANDIDATES[0]) -> ScoreSettings:
    """Returns the best candidate if it beats the default by two standard errors, else the default."""
    first = next(c for c in ranked if c.settings == default)
    best = max(ranked, key=lambda candidate: candidate.image_auroc)
    better = best.image_auroc > first.image_auroc + _STANDARD_ERRORS * first.error
    return best.settings if better else first.settings


def select_map(ranked: list[MapCandidate], default: AnomalyMapConfig = MAP_CANDIDATES[0]) -> AnomalyMapConfig:
    """Returns the best candidate if it beats the default by 0.01, else the default."""
    best, first = ranked[0], next(c for c in ranked if c.config == default)
    return best.config if best.mean > first.mean + _GAIN else first.config


def score_candidates(size: int) -> tuple[ScoreSettings, ...]:
    """Returns ``SCORE_CANDIDATES`` with widths for images of this size."""
    ratio = max(1.0, size / _SIDE)
    return tuple(
        replace(score, sigma=score.sigma * ratio, presmooth_sigma=score.presmooth_sigma * ratio)
        for score in SCORE_CANDIDATES
    )


def map_candidates(size: int) -> tuple[AnomalyMapConfig, ...]:
    """Returns ``MAP_CANDIDATES`` with widths for images of this size."""
    return tuple(replace(config, sigma=config.sigma * max(1.0, size / _SIDE)) for config in MAP_CANDIDATES)
