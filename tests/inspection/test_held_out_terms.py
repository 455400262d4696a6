"""Terms and maps of one evaluation of the models give the results of evaluations of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastmaf.images.dataset import to_unit
from fastmaf.inspection.fit import Fitted
from fastmaf.inspection.held_out_terms import HeldOutTerms, out_of_fold_results
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, Reference, ScoreSettings
from fastmaf.inspection.selection.ranking import DrawnSets, draw_sets, rank_maps, rank_scores

SCORES = (ScoreSettings(), ScoreSettings(presmooth_sigma=0.7))
MAPS = (AnomalyMapConfig(2), AnomalyMapConfig(5, sigma=2.0))

Known = tuple[torch.Tensor, Fitted, DrawnSets, HeldOutTerms]


@pytest.fixture(scope="module")
def known(fitted: tuple[torch.Tensor, Fitted]) -> Known:
    pixels, result = fitted
    drawn = draw_sets(pixels, 2, 0)
    return pixels, result, drawn, HeldOutTerms.of(result.out_of_fold, drawn.sets, SCORES, MAPS)


@pytest.mark.parametrize("reference", ["training", "held-out"])
@pytest.mark.parametrize("k", [0, 1])
def test_results_are_those_of_an_evaluation(known: Known, reference: Reference, k: int) -> None:
    pixels, result, drawn, terms = known
    score, config = replace(SCORES[k], reference=reference), replace(MAPS[k], rms=3.0)
    sets: Sequence[torch.Tensor] = [pixels, drawn.defects[0].pixels]
    expected = out_of_fold_results(sets, result.out_of_fold, score, config)
    found = out_of_fold_results(sets, result.out_of_fold, score, config, terms)
    assert found.scores.shape == (2, len(pixels))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.held_out.mean, expected.held_out.mean)
    torch.testing.assert_close(found.held_out.deviation, expected.held_out.deviation)


def test_ranks_are_those_of_an_evaluation(known: Known) -> None:
    pixels, result, drawn, terms = known
    options = {"drawn_sets": drawn, "progress": False}
    scores = [rank_scores(pixels, result.out_of_fold, candidates=SCORES, known=of, **options) for of in (None, terms)]
    for one, other in zip(*scores, strict=True):
        assert one.settings == other.settings and one.image_auroc == pytest.approx(other.image_auroc, abs=2e-3)
    maps = [rank_maps(pixels, result.out_of_fold, candidates=MAPS, known=of, **options) for of in (None, terms)]
    for first, second in zip(*maps, strict=True):
        assert first.config == second.config
        assert first.mean == pytest.approx(second.mean, abs=1e-4)


def test_images_of_the_sets_are_on_the_unit_interval(known: Known) -> None:
    pixels, _, drawn, terms = known
    assert torch.equal(drawn.sets[0], to_unit(pixels)) and terms.size == (3, len(pixels))
