"""The AUROC and its bootstrap, against answers worked by hand and coverage."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from fastmaf.metrics.auroc import auroc
from fastmaf.metrics.evaluate import evaluate_scores


def test_auroc_ranks_in_float64() -> None:
    # every defect 1e-6 nats above a normal; in float32, whose step at 4e4 is 0.004, all would be tied
    normal = -41545.0 + np.arange(20) * 2e-6
    nll = np.concatenate([normal, normal + 1e-6])
    defect = np.arange(40) >= 20
    wins = sum(d > g for d in nll[20:] for g in nll[:20])
    assert len(np.unique(nll)) == 40 and wins == 210
    assert auroc(nll, defect) == wins / 400
    assert auroc(nll.astype(np.float32), defect) == 0.5


def test_bootstrap_by_hand_and_by_seed() -> None:
    # one defect between two normals: resampled normals give 1, 1/2 or 0 with probability 1/4, 1/2, 1/4
    e = evaluate_scores(np.array([0.0, 2.0, 1.0]), ["good", "good", "x"])
    assert e.auroc == 0.5 and e.auroc_interval == (0, 1)
    rng = np.random.default_rng(0)
    nll, labels = np.concatenate([rng.normal(0, 1, 23), rng.normal(1, 1, 109)]), ["good"] * 23 + ["x"] * 109
    first, again, other = (evaluate_scores(nll, labels, seed=s).auroc_interval for s in (5, 5, 6))
    assert first == again != other
    assert first is not None and other is not None
    np.testing.assert_allclose(first, other, atol=0.02)
    assert first[1] - first[0] == pytest.approx(4 * 0.05, rel=0.5)  # standard error about 0.05 with 23 normals


def test_bootstrap_interval_covers_the_truth() -> None:
    """N(0, 1) against N(1, 1) has AUROC Phi(1 / sqrt 2). Of 100 intervals of nominally 95 (in truth about 93) per cent
    at this size, 85 is more than three standard deviations (2.5) low."""
    truth = NormalDist().cdf(1 / math.sqrt(2))
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        nll = np.concatenate([rng.normal(0, 1, 30), rng.normal(1, 1, 60)])
        e = evaluate_scores(nll, ["good"] * 30 + ["x"] * 60, bootstrap=300)
        assert e.auroc_interval is not None and e.auroc_interval[0] <= e.auroc <= e.auroc_interval[1]
        hits += e.auroc_interval[0] <= truth <= e.auroc_interval[1]
    assert hits >= 85


def test_bootstrap_is_the_same_in_chunks() -> None:
    # 5000 scores make chunks of 800 resamples; the distribution, not the draws, is what must not change
    rng = np.random.default_rng(0)
    nll = np.concatenate([rng.normal(0, 1, 2500), rng.normal(1, 1, 2500)])
    low, high = evaluate_scores(nll, ["good"] * 2500 + ["x"] * 2500, bootstrap=1000).auroc_interval or (0, 0)
    assert low < NormalDist().cdf(1 / math.sqrt(2)) < high and high - low < 0.03
