"""Baselines as flows, and a fit that takes the score of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import to_unit
from fastmaf.inspection.baselines import all_baselines
from fastmaf.inspection.decisions import decisions
from fastmaf.inspection.fit import fit
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.out_of_fold import OutOfFoldModels, drop_fold, k_fold
from fastmaf.inspection.scoring.float64_flow import FlowValues
from fastmaf.inspection.scoring.score import TermStatistics, image_scores, score_maps, terms_of
from fastmaf.inspection.selection import select
from fastmaf.inspection.selection.baselines import BASELINES, better_baseline
from fastmaf.inspection.selection.ranking import DrawnSets, draw_sets, rank_scores
from tests.inspection.tiny import FIXED, waves

OPEN = replace(FIXED, blocks=0, folds=3, score=None, map_config=None)


@pytest.mark.parametrize("name", BASELINES)
def test_a_flow_scores_as_its_baseline(name: str) -> None:
    pixels, new = waves(30), waves(12, seed=1)
    (baseline,) = [b for b in all_baselines() if b.name == name]
    expected = torch.from_numpy(baseline.fit(pixels).score(new)[0])
    make, settings = BASELINES[name]
    flow, x = make(to_unit(pixels)), to_unit(new)
    values = FlowValues(flow, x)
    if settings.needs_nll:
        actual = values.nll
        if "PCA" in name:  # half of the squared norm in levels, and a constant
            actual, expected = actual - actual[0], 0.5 * 255**2 * (expected - expected[0])
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-3)
        return
    held_out = torch.empty(len(pixels), x.shape[1], dtype=torch.float64)
    for fold in k_fold(len(pixels), 5, 0):
        of_fold = make(drop_fold(to_unit(pixels), fold))
        held_out[fold] = terms_of(FlowValues(of_fold, to_unit(pixels)[fold]), settings)
    statistics = TermStatistics.of(held_out, held_out.sum(dim=1))
    scores = image_scores(
        score_maps(terms_of(values, settings), statistics, settings), values.nll, statistics, settings
    )
    assert torch.allclose(scores, expected, rtol=1e-4)


def test_the_best_baseline_is_returned_only_if_it_is_better_by_the_margin() -> None:
    pixels = waves(24)
    fitted = fit(pixels, replace(FIXED, blocks=0, folds=3), progress=False)
    (chosen,) = rank_scores(pixels, fitted.out_of_fold, candidates=[FIXED.score], draws=1, progress=False)  # type: ignore[list-item]
    drawn = draw_sets(pixels, 1, 0)
    _, found = better_baseline(pixels, fitted.out_of_fold, chosen, 0.0, drawn)
    assert set(found) == set(BASELINES)
    best = max(found, key=lambda name: found[name])
    for auroc in (found[best] - 0.02, found[best] + 0.02):
        result = better_baseline(pixels, fitted.out_of_fold, replace(chosen, image_auroc=auroc), 0.01, drawn)[0]
        assert (result is None) == (auroc > found[best])
        if result is not None:
            assert result.name == best and result.score == BASELINES[best][1]
            flow = BASELINES[best][0](drop_fold(to_unit(pixels), result.models.folds[0]))
            assert torch.equal(flow.transforms[0].mean, result.models.flows[0].transforms[0].mean)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", BASELINES)
def test_a_fit_takes_the_score_of_a_better_baseline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(pixels: Tensor, models: OutOfFoldModels, chosen: object, margin: float, drawn: DrawnSets) -> object:
        monkeypatch.setattr("fastmaf.inspection.selection.baselines.BASELINES", {name: BASELINES[name]})
        return better_baseline(pixels, models, replace(chosen, image_auroc=0.0), 0.0, drawn)  # type: ignore[type-var]

    monkeypatch.setattr(select, "better_baseline", one)
    monkeypatch.setattr(select, "_IMAGES", 17)  # of 24: the model is fitted to all of them
    pixels, new = waves(24), waves(10, seed=1)
    model = fit(pixels, OPEN, progress=False).model
    assert model.about["baseline"] == name and model.settings == BASELINES[name][1]
    assert decisions(model)["score"].startswith(f"{name}, a baseline (image AUROC on synthetic defects")
    (baseline,) = [b for b in all_baselines() if b.name == name]
    if model.settings.needs_nll:
        expected = baseline.fit(pixels).score(new)[0]
        assert np.argsort(model.scores(new)).tolist() == np.argsort(expected).tolist()
    model.save(tmp_path / "model.safetensors")
    again = load_inspection(tmp_path / "model.safetensors")
    assert np.array_equal(again.scores(new), model.scores(new))
    maps = again.anomaly_maps(new)
    assert np.isfinite(maps).all() and 0.3 < float(np.sqrt(np.square(maps).mean())) < 3
    assert isinstance(
        fastmaf.Detector.load(tmp_path / "model.safetensors").predict(list(new.permute(0, 2, 3, 1).numpy())), np.ndarray
    )


def test_a_requested_score_is_not_compared_with_baselines() -> None:
    about = fit(waves(24), replace(FIXED, blocks=0, folds=3), progress=False).model.about
    assert "baseline" not in about and "drawn_auroc_of_baselines" not in about
