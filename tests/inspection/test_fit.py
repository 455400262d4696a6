"""What a fit consists of: folds, statistics, units, dequantisation, and the choice of its constants."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastmaf
from fastmaf.images.dataset import load_test, load_train, to_unit
from fastmaf.inspection.fit import Fitted, dequantized, fit
from fastmaf.inspection.fold_models import FOLDS_FOLDER, load_fold_models
from fastmaf.inspection.folds import drop_fold
from fastmaf.inspection.out_of_fold import out_of_fold_scores
from fastmaf.inspection.scoring.anomaly_map import AnomalyMapConfig, anomaly_maps, residuals_of
from fastmaf.inspection.scoring.float64_flow import FlowValues
from fastmaf.inspection.scoring.score import ScoreSettings, TermStatistics, score_maps, terms_of
from fastmaf.inspection.selection.maps import describe_maps, rank_maps
from fastmaf.inspection.selection.scores import describe_scores, rank_scores
from fastmaf.inspection.whitening import fit_whitening
from fastmaf.inspection.workflow.choose import choose
from fastmaf.inspection.workflow.evaluate import evaluate
from fastmaf.inspection.workflow.train import train
from fastmaf.metrics.auroc import auroc
from tests.inspection.tiny import TINY, silent


def test_a_fold_is_scored_by_what_has_not_seen_it(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, found = fitted
    x = to_unit(pixels)
    assert sorted(np.concatenate(found.out_of_fold.folds).tolist()) == list(range(24))
    terms = torch.empty_like(x)
    for fold, flow in zip(found.out_of_fold.folds, found.out_of_fold.flows, strict=True):
        values = FlowValues(flow, x[fold])
        terms[fold], nll = terms_of(values, TINY.score).float(), values.nll
        assert np.allclose(found.out_of_fold.nll(x)[fold], nll)
        assert torch.allclose(nll, -copy.deepcopy(flow).double().log_prob(x[fold].double()), rtol=1e-6)
    assert torch.allclose(found.model.statistics.mean, terms.mean(dim=0), rtol=1e-4, atol=1e-5)
    # The same once more, by hand: statistics of the other folds, the mean of the largest half percent (one pixel).
    fold = found.out_of_fold.folds[1]
    others = np.setdiff1d(np.arange(24), fold)
    statistics = TermStatistics.of(terms[others], torch.zeros(len(others)))
    expected = score_maps(terms[fold], statistics, TINY.score).flatten(1).amax(dim=1)
    scores = out_of_fold_scores(x, found.out_of_fold, TINY.score)[1]
    assert np.allclose(scores[fold], expected, rtol=1e-4)
    assert np.allclose(np.sort(scores), found.model.calibration.scores)


def test_the_seed_repeats_a_fit(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, found = fitted
    again = fit(pixels, TINY, progress=False).model
    assert np.allclose(again.calibration.scores, found.model.calibration.scores, rtol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
def test_the_augmentation_makes_held_out_images_most_likely(data: Path, turned: bool) -> None:
    pixels = load_train(data, size=16, progress=False).pixels
    generator = torch.Generator().manual_seed(0)
    if turned:
        turns = torch.randint(4, (len(pixels),), generator=generator).tolist()
        pixels = torch.stack([image.rot90(k, (1, 2)) for image, k in zip(pixels, turns, strict=True)])
    # Many factors, so that what a whole turn takes can be explained at all.
    recipe = replace(TINY, rank=60, blocks=0, angles=4)
    found = fit(pixels, recipe, progress=False)
    chosen, tried = found.model.about["recipe"]["augmentation"], found.model.about["held_out_nll_of_augmentations"]
    assert chosen == ("rotations" if turned else "shifts") == min(tried, key=tried.get)
    fold, first = found.out_of_fold.folds[0], found.out_of_fold.flows[0].transforms[0]
    x = to_unit(pixels)
    for kind in tried:
        own = fit_whitening(drop_fold(x, fold), replace(recipe, augmentation=kind))
        nll = -fastmaf.Flow(768, [own]).log_prob(x[fold]).mean()
        assert float(nll) == pytest.approx(tried[kind], rel=1e-4)
        assert torch.allclose(own.variance, first.variance, rtol=1e-3) == (kind == chosen)
    fixed = fit(pixels, replace(recipe, augmentation=chosen), progress=False)
    assert np.allclose(fixed.model.calibration.scores, found.model.calibration.scores, rtol=1e-4)


def test_choosing_prefers_what_finds_drawn_defects(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, found = fitted
    candidates = [ScoreSettings("nll", "flow"), ScoreSettings(), replace(ScoreSettings(), source="flow")]
    judged = rank_scores(pixels, found.out_of_fold, candidates=candidates, draws=2, progress=False)
    assert {one.settings for one in judged} == set(candidates)
    assert [one.image_auroc for one in judged] == sorted((one.image_auroc for one in judged), reverse=True)
    text = describe_scores(judged)
    assert text.count("(default)") == 1 and "no test image is read" in text


def test_choosing_a_map_prefers_what_shows_drawn_defects(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, found = fitted
    candidates = [AnomalyMapConfig(0, 1.0), AnomalyMapConfig(), replace(AnomalyMapConfig(), sigma=6.0)]
    judged = rank_maps(pixels, found.out_of_fold, candidates=candidates, draws=2, progress=False)
    assert {one.config for one in judged} == set(candidates) and judged[-1].config.sigma == 6.0
    assert [one.mean for one in judged] == sorted((one.mean for one in judged), reverse=True)
    assert describe_maps(judged).count("(default)") == 1


def test_choosing_on_a_folder_judges_scores_and_maps(data: Path) -> None:
    text = choose(data, size=8, draws=1, progress=False)
    assert text.count("(default)") == 2 and "AUROC" in text and "AU-PRO" in text


def test_the_unit_of_maps_is_the_root_mean_square_of_held_out_ones(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, found = fitted
    x, config = to_unit(pixels), found.model.map_config
    squares = [
        anomaly_maps(residuals_of(FlowValues(flow, x[fold]), config), config).square()
        for fold, flow in zip(found.out_of_fold.folds, found.out_of_fold.flows, strict=True)
    ]
    assert float(torch.cat(squares).mean()) == pytest.approx(1, rel=1e-5)
    low, high = found.model.map_levels
    assert high == pytest.approx(float(torch.cat(squares).max().sqrt()), rel=1e-5) and low < high


def test_dequantised_values_stay_in_their_bins() -> None:
    x = torch.linspace(0, 1, 256).expand(50, 256)
    spread = (dequantized(x, 3) - x) * 255
    assert -0.5 <= float(spread.min()) < -0.49 and 0.49 < float(spread.max()) <= 0.5
    assert abs(float(spread.mean())) < 0.02 and float(spread.var()) == pytest.approx(1 / 12, rel=0.05)


@pytest.mark.parametrize("logit", [None, 0.05])
def test_dequantisation_and_logit_are_in_the_nll_alone(data: Path, logit: float | None) -> None:
    recipe = replace(TINY, dequantize=True, logit=logit)
    pixels = load_train(data, size=16, progress=False).pixels
    found = fit(pixels, recipe, progress=False)
    x = to_unit(pixels)
    fold, flow = found.out_of_fold.folds[2], found.out_of_fold.flows[2]
    assert isinstance(flow.transforms[0], fastmaf.GaussianWhitening if logit is None else fastmaf.Logit)
    expected = -flow.log_prob(dequantized(x, recipe.seed)[fold])
    nll = found.out_of_fold.nll(dequantized(x, recipe.seed))
    assert np.allclose(nll[fold], expected.detach(), rtol=1e-5)
    scores = out_of_fold_scores(x, found.out_of_fold, recipe.score)[1]
    assert np.allclose(np.sort(scores), found.model.calibration.scores)
    about = found.model.about
    assert about["held_out_nll"] == pytest.approx(float(nll.mean()), rel=1e-5)
    first, flow = found.out_of_fold.folds[0], found.out_of_fold.flows[0]
    whitening = fastmaf.Flow(flow.features, flow.transforms[: 1 + (logit is not None)])  # type: ignore[arg-type]
    alone = FlowValues(whitening, dequantized(x, recipe.seed)[first]).nll.mean()
    assert about["held_out_nll_of_augmentations"][about["recipe"]["augmentation"]] == pytest.approx(
        float(alone), rel=1e-5
    ), "of the pixels, whatever comes before the whitening"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logit": 0.5}, r"logit must lie in \(0, 0.5\); found 0.5"),
        ({"logit": 0.0}, r"logit must lie in \(0, 0.5\); found 0.0"),
        ({"logit": 1e-3, "dequantize": True}, r"logit must lie in \(0.00195312, 0.5\); found 0.001"),
        ({"angles": 0}, "angles must be at least 1; found 0"),
        ({"augmentation": "both"}, "augmentation must be 'auto' or one of 'none', 'shifts', 'rotations'; found 'both'"),
    ],
)
def test_a_recipe_that_cannot_be_fitted_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong)


def test_the_smallest_logit_takes_bins_beyond_black_and_white() -> None:
    recipe = replace(TINY, logit=1 / 512 + 1e-6, dequantize=True)
    assert recipe.logit is not None
    ends = torch.tensor([[-0.5 / 255, 1 + 0.5 / 255]])
    assert bool(torch.isfinite(fastmaf.Logit(2, recipe.logit)(ends)[0]).all())


def test_images_that_are_all_the_same_can_be_fitted() -> None:
    pixels = torch.full((6, 3, 16, 16), 128, dtype=torch.uint8)
    model = fit(pixels, TINY, progress=False).model
    assert np.isfinite(model.predict(pixels[:1]).anomaly_maps).all() and model.map_config.rms == 1.0


def test_the_ensemble_of_the_folds(data: Path, tmp_path: Path) -> None:
    fitted = train(data, tmp_path, TINY, keep_folds=True, progress=False, say=silent)
    assert len(load_fold_models(tmp_path, fitted.model)) == 3
    rows = evaluate(tmp_path, data, tmp_path / "e", progress=False, say=silent)
    (row,) = [row for row in rows if "3 folds" in row.name]
    assert row.name == f"{rows[0].name}, 3 folds"
    images = load_test(data, size=16, progress=False)
    x, statistics = to_unit(images.pixels), fitted.model.statistics
    terms = [terms_of(FlowValues(flow, x), TINY.score) for flow in fitted.out_of_fold.flows]
    maps = torch.stack([score_maps(part, statistics, TINY.score) for part in terms]).mean(dim=0)
    scores = maps.flatten(1).amax(dim=1).numpy()  # half a percent of 256 is one pixel
    assert not np.allclose(fitted.model.predict(images.pixels).scores, scores, rtol=1e-3)
    assert row.auroc == pytest.approx(auroc(scores, np.array([label != "good" for label in images.labels])))
    # Those of another fit are not taken for this one's.
    other = fit(load_train(data, size=16, progress=False).pixels, replace(TINY, rank=5), progress=False)
    assert not load_fold_models(tmp_path, other.model) and not load_fold_models(tmp_path / FOLDS_FOLDER, fitted.model)
    train(data, tmp_path, replace(TINY, folds=2), keep_folds=True, progress=False, say=silent)
    assert len(list((tmp_path / FOLDS_FOLDER).iterdir())) == 2
    train(data, tmp_path, TINY, progress=False, say=silent)
    assert not (tmp_path / FOLDS_FOLDER).exists()
