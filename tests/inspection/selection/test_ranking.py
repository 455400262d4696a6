"""Ranking scores and anomaly maps on synthetic defects."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastmaf.inspection.fit import Fitted
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.inspection.selection.description import describe_maps, describe_scores
from fastmaf.inspection.selection.ranking import rank_maps, rank_scores


def test_scores_are_ranked_by_their_auroc_on_synthetic_defects(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, fit = fitted
    candidates = [ScoreSettings("nll", "flow"), ScoreSettings(), replace(ScoreSettings(), source="flow")]
    ranked = rank_scores(pixels, fit.out_of_fold, candidates=candidates, draws=2, progress=False)
    assert {candidate.settings for candidate in ranked} == set(candidates)
    aurocs = [candidate.image_auroc for candidate in ranked]
    assert aurocs == sorted(aurocs, reverse=True)
    text = describe_scores(tuple(ranked))
    assert text.count("(default)") == 1


def test_maps_are_ranked_by_their_pixel_metrics_on_synthetic_defects(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, fit = fitted
    candidates = [AnomalyMapConfig(0, 1.0), AnomalyMapConfig(), replace(AnomalyMapConfig(), sigma=6.0)]
    ranked = rank_maps(pixels, fit.out_of_fold, candidates=candidates, draws=2, progress=False)
    assert {candidate.config for candidate in ranked} == set(candidates) and ranked[-1].config.sigma == 6.0
    means = [candidate.mean for candidate in ranked]
    assert means == sorted(means, reverse=True)
    assert describe_maps(tuple(ranked)).count("(default)") == 1
