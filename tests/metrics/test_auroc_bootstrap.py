"""Image AUROC: intervals and paired differences against answers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastmaf.metrics.auroc import auroc, auroc_interval, paired_bootstrap
from fastmaf.metrics.intervals import auroc_score_interval
from fastmaf.metrics.results import EvaluationError


def some_scores(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    defect = np.arange(132) >= 23
    severity = rng.normal(1.5, 1, 132) * defect
    return severity + rng.normal(0, 1, 132), severity + rng.normal(0, 1, 132), defect


def test_paired_difference_by_hand() -> None:
    # The defect is above both normals by b, above the first alone by a. A resample holds the first twice, each once (in
    # two ways) or the second twice: a - b is 0, -1/2 or -1.
    a, b, defect = np.array([0.0, 2.0, 1.0]), np.array([0.0, 1.0, 2.0]), np.array([False, False, True])
    result = paired_bootstrap(a, b, defect)
    assert (result.difference, result.not_better) == (-0.5, 1)
    assert (result.low, result.high) == (-1, 1), "one defect says nothing of others"
    assert result.resamples == 2000
    assert paired_bootstrap(b, a, defect).not_better == pytest.approx(0.25, abs=0.04)  # four standard errors


def test_paired_difference_of_equal_rankings_is_zero() -> None:
    a, _, defect = some_scores()
    result = paired_bootstrap(a, 1000 * np.exp(a), defect, resamples=50)
    assert (result.difference, result.low, result.high, result.not_better) == (0, 0, 0, 1)


def test_paired_difference_is_antisymmetric_and_repeats() -> None:
    a, b, defect = some_scores()
    first, reverse = paired_bootstrap(a, b, defect, seed=4), paired_bootstrap(b, a, defect, seed=4)
    assert first == paired_bootstrap(a, b, defect, seed=4) != paired_bootstrap(a, b, defect, seed=5)
    assert first.difference == auroc(a, defect) - auroc(b, defect) == -reverse.difference
    assert (first.low, first.high) == pytest.approx((-reverse.high, -reverse.low))
    assert first.low < first.difference < first.high
    assert first.not_better + reverse.not_better >= 1  # resamples with equal areas count in both


def test_pairing_narrows_the_interval() -> None:
    # two scores that share most of their noise: the difference is far better known than either area
    a, other, defect = some_scores()
    b = a + np.random.default_rng(1).normal(0, 0.2, len(a))
    paired, unpaired = paired_bootstrap(a, b, defect), paired_bootstrap(a, np.roll(other, 23), defect)
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 2
    low, high = auroc_interval(a, defect)
    assert paired.high - paired.low < high - low


def test_scores_without_an_error_have_intervals() -> None:
    """Every resample of images that are ranked correctly is ranked correctly, too."""
    defect = np.arange(8) >= 4
    a, b = np.arange(8.0), np.array([3.0, 2, 1, 0, 7, 6, 5, 4])
    low, high = auroc_interval(a, defect)
    assert (low, high) == auroc_score_interval(1.0, 4, 4) and 0.5 < low < 0.65 and high == 1
    assert auroc_interval(-a, defect) == pytest.approx((0, 1 - low))
    result = paired_bootstrap(a, b, defect)
    assert (result.difference, result.not_better) == (0, 1) and result.low == -result.high < -0.3
    more = np.arange(200) >= 100
    assert auroc_interval(np.arange(200.0), more)[0] > 0.97


def test_paired_difference_allows_infinite_scores() -> None:
    a, b, defect = some_scores()
    a[-5:] = math.inf
    assert paired_bootstrap(a, b, defect, resamples=20).difference == auroc(a, defect) - auroc(b, defect)


def test_auroc_interval_resamples_normals_and_defects_separately() -> None:
    # one defect between two normals: a resample of the normals gives 0, 1/2 or 1
    scores, defect = np.array([0.0, 2.0, 1.0]), np.array([False, False, True])
    assert auroc_interval(scores, defect, 200, 0) == (0, 1), "no narrower than the bootstrap"
    a, _, defect = some_scores()
    low, high = auroc_interval(a, defect, 2000, 0)
    assert low < auroc(a, defect) < high and auroc_interval(a, defect, 2000, 0) == (low, high)
    assert auroc_interval(np.full(132, 7.0), defect, 50, 0) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("a", "b", "defect", "message"),
    [
        ([1.0, math.nan], [1.0, 2.0], [False, True], "first scores are NaN"),
        ([1.0, 2.0], [1.0, -math.inf], [False, True], "second scores are -inf"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], [False, True], "3 first scores and 2 labels"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], [False, True], "3 second scores and 2 labels"),
        ([1.0, 2.0], [1.0, 2.0], [True, True], "found 0 and 2"),
        ([], [], [], "found 0 and 0"),
    ],
)
def test_errors_of_paired_bootstrap(a: list[float], b: list[float], defect: list[bool], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        paired_bootstrap(np.array(a), np.array(b), np.array(defect, dtype=bool))


def test_no_resamples_are_refused() -> None:
    a, b, defect = some_scores()
    with pytest.raises(EvaluationError, match="resamples must be at least 1; found 0"):
        paired_bootstrap(a, b, defect, resamples=0)
