"""The score and the map that a fit selects by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastmaf.inspection.fit import Fitted, fit
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.inspection.selection.ranking import MapCandidate, ScoreCandidate, rank_maps, rank_scores
from fastmaf.inspection.selection.select import (
    MAP_CANDIDATES,
    REFERENCES,
    SCORE_CANDIDATES,
    select_map,
    select_score,
    select_score_and_map,
)
from tests.inspection.tiny import TINY

OPEN = replace(TINY, score=None, map_config=None)


def test_settings_of_the_recipe_are_kept(fitted: tuple[torch.Tensor, Fitted]) -> None:
    score, config = ScoreSettings("nll"), AnomalyMapConfig(3, 1.0)
    selected = select_score_and_map(replace(TINY, score=score, map_config=config), fitted[0], fitted[1].out_of_fold)
    assert selected == (score, config, None, {}, None)


@pytest.mark.parametrize(("auroc", "selected"), [(0.7, 0), (0.8, 0), (0.8399, 0), (0.8401, 1), (0.95, 1)])
def test_another_score_must_be_better_by_two_standard_errors_of_the_first(auroc: float, selected: int) -> None:
    first, other = SCORE_CANDIDATES
    ranked = [ScoreCandidate(first, {}, 0.8, 0.02), ScoreCandidate(other, {}, auroc, 0.001)]
    ranked.sort(key=lambda candidate: -candidate.image_auroc)
    assert select_score(ranked) == SCORE_CANDIDATES[selected]


@pytest.mark.parametrize(("auroc", "selected"), [(0.7, 0), (0.9, 0), (0.9199, 0), (0.9201, 1), (0.99, 1)])
def test_another_map_must_be_better_by_a_hundredth_in_the_mean(auroc: float, selected: int) -> None:
    first, other = MAP_CANDIDATES
    ranked = [MapCandidate(first, 0.9, 0.8), MapCandidate(other, auroc, 0.8)]
    ranked.sort(key=lambda candidate: -candidate.mean)
    assert select_map(ranked) == MAP_CANDIDATES[selected]


def test_the_selection_follows_from_the_ranking_on_synthetic_defects(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, models = fitted[0], fitted[1].out_of_fold
    score, config, _, figures, _ = select_score_and_map(OPEN, pixels, models)
    options: dict[str, Any] = {"draws": 1, "seed": OPEN.seed, "progress": False}
    both = {
        reference: [replace(candidate, reference=reference) for candidate in SCORE_CANDIDATES]
        for reference in REFERENCES
    }
    ranked = {
        reference: rank_scores(pixels, models, candidates=candidates, **options)
        for reference, candidates in both.items()
    }
    plain = {
        reference: next(c.image_auroc for c in scores if not c.settings.presmooth_sigma)
        for reference, scores in ranked.items()
    }
    reference = max(plain, key=lambda name: plain[name])
    scores = ranked[reference]
    maps = rank_maps(pixels, models, candidates=MAP_CANDIDATES, **options)
    assert (score, config) == (select_score(scores, both[reference][0]), select_map(maps))
    assert figures["drawn_auroc_of_references"] == plain
    areas, means = {c.settings: c.image_auroc for c in scores}, {c.config: c.mean for c in maps}
    assert figures["drawn_auroc"] == {
        "presmooth 0": areas[both[reference][0]],
        "presmooth 0.7": areas[both[reference][1]],
    }
    assert figures["drawn_maps"] == {
        "150 factors": means[AnomalyMapConfig()],
        "400 factors": means[AnomalyMapConfig(factors=400)],
    }


def test_scores_that_are_ranked_together_have_their_own_statistics(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, models = fitted[0], fitted[1].out_of_fold
    sources: tuple[Any, ...] = ("pixels", "whitened")
    candidates = [
        ScoreSettings("nll", "flow"),
        *(ScoreSettings(source=s, reference=r) for s in sources for r in REFERENCES),
    ]
    options: dict[str, Any] = {"draws": 1, "progress": False, "errors": False}
    together = {c.settings: c.image_auroc for c in rank_scores(pixels, models, candidates=candidates, **options)}
    for candidate in candidates:
        (alone,) = rank_scores(pixels, models, candidates=[candidate], **options)
        assert together[candidate] == alone.image_auroc


def test_a_worse_score_and_a_worse_map_are_ranked_last(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, models = fitted[0], fitted[1].out_of_fold
    blurred, coarse = ScoreSettings(presmooth_sigma=9.0), AnomalyMapConfig(0, sigma=9.0)
    scores = rank_scores(pixels, models, candidates=(blurred, ScoreSettings()), draws=1, progress=False)
    maps = rank_maps(pixels, models, candidates=(coarse, AnomalyMapConfig()), draws=1, progress=False)
    assert scores[-1].settings == blurred and scores[0].image_auroc > scores[1].image_auroc
    assert maps[-1].config == coarse and maps[0].mean > maps[1].mean


def test_a_fit_records_its_selection() -> None:
    pixels = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = fit(pixels, OPEN, progress=False).model
    about = model.about
    assert set(about["drawn_auroc"]) == {"presmooth 0", "presmooth 0.7"}
    assert about["recipe"]["score"]["presmooth_sigma"] == model.settings.presmooth_sigma
    assert about["recipe"]["map_config"]["factors"] == model.map_config.factors
    gain = about["drawn_maps"]["400 factors"] - about["drawn_maps"]["150 factors"]
    assert model.map_config.factors == (400 if gain > 0.01 else 150)


def test_the_first_candidates_are_the_defaults() -> None:
    assert SCORE_CANDIDATES[0] == ScoreSettings() and MAP_CANDIDATES[0] == AnomalyMapConfig()
