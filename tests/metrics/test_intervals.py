"""Intervals that hold for a handful of images."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from fastmaf.metrics.auroc import auroc, auroc_interval
from fastmaf.metrics.intervals import auroc_score_interval, difference_interval, rate_interval, small_sample_factor


@pytest.mark.parametrize(("area", "m", "n"), [(0.5, 1, 1), (0.9, 4, 20), (0.73, 23, 109), (1.0, 4, 4), (0.0, 3, 7)])
def test_the_ends_of_the_score_interval_solve_its_equation(area: float, m: int, n: int) -> None:
    for end in auroc_score_interval(area, m, n):
        pairs = (1 - end) / (2 - end) + end / (1 + end)
        variance = end * (1 - end) / (m * n) * (1 + ((m + n) / 2 - 1) * pairs)
        assert (area - end) ** 2 == pytest.approx(norm.ppf(0.975) ** 2 * variance, abs=1e-9)
    low, high = auroc_score_interval(area, m, n)
    assert 0 <= low <= area <= high <= 1 and low < high
    assert auroc_score_interval(1 - area, m, n) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("m", "n"), [(4, 4), (11, 53)])
@pytest.mark.parametrize("area", [0.9, 0.99])
def test_intervals_of_aurocs_hold_the_true_value(area: float, m: int, n: int) -> None:
    """In 95% of 200 simulations, minus four standard errors of that share; the bootstrap alone: in 25% to 85%."""
    rng, defect = np.random.default_rng(0), np.arange(m + n) >= m
    true = math.sqrt(2) * norm.ppf(area) * defect
    held = 0
    for seed in range(200):
        low, high = auroc_interval(true + rng.normal(size=m + n), defect, 100, seed)
        held += low <= area <= high
    assert held >= 200 * (0.95 - 4 * math.sqrt(0.95 * 0.05 / 200))


def test_a_difference_of_independent_values_adds_their_variances() -> None:
    low, high = difference_interval(0.9, 0.8, (0.87, 0.93), (0.76, 0.84), 0.0)
    assert (low, high) == pytest.approx((0.05, 0.15))
    low, high = difference_interval(0.9, 0.8, (0.87, 0.93), (0.77, 0.83), 1.0)
    assert low == pytest.approx(high) == pytest.approx(0.1)


def test_one_image_has_no_interval_and_many_need_no_widening() -> None:
    assert small_sample_factor(1) == math.inf
    assert small_sample_factor(10_000) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("count", "n"), [(0, 4), (4, 4), (1, 11), (7, 23), (0, 1)])
def test_rates_have_exact_intervals(count: int, n: int) -> None:
    expected = binomtest(count, n).proportion_ci(0.95, "exact")
    assert rate_interval(count, n) == pytest.approx((expected.low, expected.high))


def test_constants_and_single_images() -> None:
    scores, defect = np.array([1.0, 2.0]), np.array([False, True])
    assert auroc(scores, defect) == 1
    low, high = auroc_interval(scores, defect)
    assert low < 0.25 and high == 1
