"""Ranking anomaly maps on synthetic defects."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastmaf.inspection.fit import Fitted
from fastmaf.inspection.scoring.settings import AnomalyMapConfig
from fastmaf.inspection.selection.maps import describe_maps, rank_maps


def test_maps_are_ranked_by_their_pixel_metrics_on_synthetic_defects(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, found = fitted
    candidates = [AnomalyMapConfig(0, 1.0), AnomalyMapConfig(), replace(AnomalyMapConfig(), sigma=6.0)]
    judged = rank_maps(pixels, found.out_of_fold, candidates=candidates, draws=2, progress=False)
    assert {one.config for one in judged} == set(candidates) and judged[-1].config.sigma == 6.0
    assert [one.mean for one in judged] == sorted((one.mean for one in judged), reverse=True)
    assert describe_maps(judged).count("(default)") == 1
