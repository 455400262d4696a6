"""Fitting: folds, statistics, units and dequantisation."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmaf
from fastmaf.images.dataset import load_train, to_unit
from fastmaf.inspection.fit import Fitted, dequantized, fit
from fastmaf.inspection.held_out_terms import out_of_fold_results
from fastmaf.inspection.scoring.float64_flow import FlowValues
from fastmaf.inspection.scoring.score import TermStatistics, anomaly_maps, residuals_of, score_maps, terms_of
from tests.inspection.tiny import TINY


def test_a_fold_is_scored_by_the_model_that_has_not_seen_it(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, result = fitted
    x = to_unit(pixels)
    assert sorted(np.concatenate(result.out_of_fold.folds).tolist()) == list(range(24))
    terms = torch.empty(24, 16 * 16)
    for fold, flow in zip(result.out_of_fold.folds, result.out_of_fold.flows, strict=True):
        values = FlowValues(flow, x[fold])
        terms[fold], nll = terms_of(values, TINY.score).float(), values.nll
        assert np.allclose(result.out_of_fold.nll(x)[fold], nll)
        assert torch.allclose(nll, -copy.deepcopy(flow).double().log_prob(x[fold].double()), rtol=1e-6)
    # The same once more, by hand: statistics of the images of the other folds under the same model, on the scale of
    # the other folds' held-out terms; the mean of the largest half percent (one pixel).
    fold = result.out_of_fold.folds[1]
    others = np.setdiff1d(np.arange(24), fold)
    of_training = terms_of(FlowValues(result.out_of_fold.flows[1], x[others]), TINY.score)
    deviation, held_out = of_training.std(dim=0), terms[others].double()
    deviation = deviation * (held_out.std(dim=0) / deviation).median()
    shift = ((held_out.mean(dim=0) - of_training.mean(dim=0)) / deviation).median()
    statistics = TermStatistics(of_training.mean(dim=0) + shift * deviation, deviation, 0.0)
    expected = score_maps(terms[fold], statistics, TINY.score).flatten(1).amax(dim=1)
    scores = out_of_fold_results([pixels], result.out_of_fold, TINY.score, TINY.map_config).scores[0]
    assert np.allclose(scores[fold], expected, rtol=1e-4)
    assert np.allclose(np.sort(scores), result.model.calibration.scores)


def test_the_seed_repeats_a_fit(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, result = fitted
    again = fit(pixels, TINY, progress=False).model
    assert np.allclose(again.calibration.scores, result.model.calibration.scores, rtol=1e-4)


def test_the_unit_of_maps_is_the_root_mean_square_of_held_out_ones(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, result = fitted
    x, config = to_unit(pixels), result.model.map_config
    squares = [
        anomaly_maps(residuals_of(FlowValues(flow, x[fold]), config), config).square()
        for fold, flow in zip(result.out_of_fold.folds, result.out_of_fold.flows, strict=True)
    ]
    assert float(torch.cat(squares).mean()) == pytest.approx(1, rel=1e-5)
    low, high = result.model.map_levels
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
    result = fit(pixels, recipe, progress=False)
    x = to_unit(pixels)
    fold, flow = result.out_of_fold.folds[2], result.out_of_fold.flows[2]
    assert isinstance(flow.transforms[0], fastmaf.GaussianWhitening if logit is None else fastmaf.Logit)
    expected = -flow.log_prob(dequantized(x, recipe.seed)[fold])
    nll = result.out_of_fold.nll(dequantized(x, recipe.seed))
    assert np.allclose(nll[fold], expected.detach(), rtol=1e-5)
    scores = out_of_fold_results([pixels], result.out_of_fold, recipe.score, recipe.map_config).scores[0]
    assert np.allclose(np.sort(scores), result.model.calibration.scores)
    about = result.model.about
    assert about["held_out_nll"] == pytest.approx(float(nll.mean()), rel=1e-5)
    alone = [
        FlowValues(
            fastmaf.Flow(flow.features, flow.transforms[: 1 + (logit is not None)]), dequantized(x, recipe.seed)[fold]
        ).nll  # type: ignore[arg-type]
        for fold, flow in zip(result.out_of_fold.folds, result.out_of_fold.flows, strict=True)
    ]
    assert about["held_out_nll_of_augmentations"][about["recipe"]["augmentation"]] == pytest.approx(
        float(torch.cat(alone).mean()), rel=1e-5
    ), "of the pixels, whatever comes before the whitening"


def test_images_that_are_all_the_same_can_be_fitted() -> None:
    pixels = torch.full((6, 3, 16, 16), 128, dtype=torch.uint8)
    model = fit(pixels, TINY, progress=False).model
    assert np.isfinite(model.predict(pixels[:1]).anomaly_maps).all() and model.map_config.rms == 1.0
