"""Ranking scores on synthetic defects."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastmaf.inspection.fit import Fitted
from fastmaf.inspection.scoring.settings import ScoreSettings
from fastmaf.inspection.selection.scores import describe_scores, rank_scores


def test_scores_are_ranked_by_their_auroc_on_synthetic_defects(fitted: tuple[torch.Tensor, Fitted]) -> None:
    pixels, found = fitted
    candidates = [ScoreSettings("nll", "flow"), ScoreSettings(), replace(ScoreSettings(), source="flow")]
    judged = rank_scores(pixels, found.out_of_fold, candidates=candidates, draws=2, progress=False)
    assert {one.settings for one in judged} == set(candidates)
    assert [one.image_auroc for one in judged] == sorted((one.image_auroc for one in judged), reverse=True)
    text = describe_scores(judged)
    assert text.count("(default)") == 1 and "no test image is read" in text
