from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy.special import betaincinv
from scipy.stats import binom

from fastmaf.inspection.calibration import Calibration, CalibrationError
from fastmaf.metrics.evaluate import conformal_threshold
from tests.inspection.tiny import calibration_of

ALPHAS = [0.01, 0.05, 0.07, 0.1, 0.13, 0.29, 1 / 3, 0.5, 0.9]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_agrees_with_the_threshold_of_the_evaluation(alpha: float) -> None:
    rng = np.random.default_rng(3)
    for n in [*range(1, 60), 99, 100, 219, 220, 500, 999]:
        scores = rng.normal(-4e4, 2e3, n)
        c = Calibration(scores, alpha, None, "split")
        threshold, how, guaranteed, rate_95 = conformal_threshold(scores, alpha)
        assert c.threshold == threshold and c.bound() == rate_95
        assert c.attainable is ("too few" not in how) is (n >= c.min_samples)
        assert c.expected_rate <= guaranteed + 1e-15
        assert c.expected_rate == guaranteed or c.attainable


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_rank_of_a_confidence_against_brute_force(alpha: float, confidence: float) -> None:
    for n in [*range(1, 40), 58, 59, 60, 219, 299]:
        c = calibration_of(n, alpha, confidence)
        # R = 1 - F(s_(k)) exceeds alpha iff fewer than n - k + 1 of the n normals fall among the alpha highest
        fitting = [k for k in range(1, n + 1) if 1 - binom.cdf(n - k, n, alpha) >= confidence - 1e-9]
        assert c.rank == (fitting[0] if fitting else n)
        assert c.attainable is bool(fitting) is (n >= c.min_samples)
        if c.attainable:
            assert c.bound(confidence) <= alpha + 1e-9
            assert c.rank == 1 or betaincinv(n + 2 - c.rank, c.rank - 1, confidence) > alpha - 1e-9
            assert c.threshold >= calibration_of(n, alpha).threshold or confidence == 0.5


@pytest.mark.parametrize(
    ("alpha", "confidence", "needed"),
    [(0.05, None, 19), (0.01, None, 99), (0.05, 0.95, 59), (0.01, 0.95, 299), (0.9, None, 1), (0.999, 0.001, 1)],
)
def test_needed(alpha: float, confidence: float | None, needed: int) -> None:
    assert calibration_of(3, alpha, confidence).min_samples == needed
    enough = calibration_of(needed, alpha, confidence)
    assert enough.attainable and enough.rank == needed or needed == 1
    if needed > 1:
        assert not calibration_of(needed - 1, alpha, confidence).attainable


@pytest.mark.parametrize(
    ("n", "alpha", "confidence"), [(3, 0.1, 0.271), (2, 0.5, 0.75), (1, 0.95, 0.95), (4, 0.2, 0.5904)]
)
def test_rounding_does_not_decide_where_the_confidence_is_met_exactly(n: int, alpha: float, confidence: float) -> None:
    assert 1 - (1 - Fraction(str(alpha))) ** n == Fraction(str(confidence))
    assert calibration_of(n, alpha, confidence).attainable and calibration_of(n, alpha, confidence).min_samples == n
    assert not calibration_of(n, alpha, confidence + 1e-9).attainable


@pytest.mark.parametrize(("n", "alpha"), [(22, 0.05), (59, 0.05), (219, 0.05), (99, 0.1), (9, 0.05)])
def test_rate_on_average_and_bound_for_a_set(n: int, alpha: float) -> None:
    """Uniform scores: a set's true rate is 1 - threshold. 4000 sets; slacks are more than four standard deviations."""
    rng = np.random.default_rng(n)
    sets = [Calibration(rng.uniform(size=n), alpha, None, "split") for _ in range(4000)]
    rates = 1 - np.array([c.threshold for c in sets])
    assert abs(rates.mean() - sets[0].expected_rate) < 4.5 * rates.std() / math.sqrt(4000)
    if sets[0].attainable:
        assert alpha - 1 / (n + 1) < sets[0].expected_rate <= alpha
    for confidence in (0.5, 0.95):
        spread = math.sqrt(confidence * (1 - confidence) / 4000)
        assert abs((rates <= sets[0].bound(confidence)).mean() - confidence) < 4.5 * spread


@pytest.mark.parametrize("n", [59, 100, 219])
def test_guarantee_with_confidence(n: int) -> None:
    rng = np.random.default_rng(n)
    rates = np.array([1 - Calibration(rng.uniform(size=n), 0.05, 0.95, "split").threshold for _ in range(4000)])
    broken = (rates > 0.05).mean()
    assert broken <= 0.05 + 4.5 * math.sqrt(0.05 * 0.95 / 4000)
    assert broken > 0.015  # a much higher rank would keep it too, at the price of misses
    on_average = np.array([1 - Calibration(rng.uniform(size=n), 0.05, None, "split").threshold for _ in range(500)])
    assert (on_average > 0.05).mean() > 0.2  # not guaranteed on average


def test_p_values_are_valid() -> None:
    rng = np.random.default_rng(0)
    p = np.concatenate(
        [Calibration(rng.uniform(size=30), 0.05, None, "split").p_values(rng.uniform(size=3)) for _ in range(4000)]
    )
    for level in np.arange(1, 32) / 31:
        assert abs((p <= level).mean() - level) < 4.5 * math.sqrt(3 * 0.25 / 12000)  # 3 of a set depend on each other


@pytest.mark.parametrize("confidence", [None, 0.8])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_p_value_and_verdict_say_the_same_with_ties_too(alpha: float, confidence: float | None) -> None:
    rng = np.random.default_rng(7)
    for n in (1, 2, 19, 20, 21, 99, 219):
        for scores in (
            rng.normal(size=n),
            rng.integers(0, 5, n).astype(float),
            np.append(rng.integers(0, 3, n - 1), np.inf),
        ):
            c = Calibration(scores, alpha, confidence, "split")
            tried = np.concatenate([scores, np.nextafter(scores, np.inf), scores - 1, [1e9, -1e9, np.inf]])
            p = c.p_values(tried)
            assert p.dtype == np.float64
            above = (scores[:, None] >= tried).sum(axis=0)
            assert np.array_equal(p, (1 + above) / (n + 1))
            assert np.array_equal(p <= c.expected_rate, c.is_anomalous(tried))
            if (
                confidence is None and c.attainable and alpha != 1 / 3
            ):  # as a decimal it is below 7/21, as a float it is equal
                assert np.array_equal(p <= alpha, c.is_anomalous(tried))


def test_a_score_equal_to_the_threshold_is_normal() -> None:
    c = Calibration(np.full(40, 2.5), 0.05, None, "split")
    assert c.is_anomalous(np.array([2.5, np.nextafter(2.5, 3)])).tolist() == [False, True]
    assert c.p_values(np.array([2.5, np.nextafter(2.5, 3)])).tolist() == [1, 1 / 41]
    assert "at most 4.88% on average" in c.describe()


def test_one_normal() -> None:
    c = Calibration([3], 0.05, None, "split")  # type: ignore[arg-type]
    assert (c.n, c.rank, c.threshold, c.expected_rate, c.attainable, c.min_samples) == (1, 1, 3, 0.5, False, 19)
    assert c.bound() == pytest.approx(0.95)  # P(R <= r) = r
    assert c.p_values(np.array([3.0, 4.0])).tolist() == [1, 0.5]
    assert c.p_values(np.empty(0)).shape == c.is_anomalous(np.empty(0)).shape == (0,)
    assert Calibration(np.array([3.0]), 0.5, None, "split").attainable


def test_infinite_scores() -> None:
    c = Calibration(np.array([np.inf, 1.0, 2.0]), 0.5, None, "split")
    assert c.threshold == 2 and c.is_anomalous(np.array([2.0, 3.0, np.inf])).tolist() == [False, True, True]
    assert c.p_values(np.array([np.inf, 5.0])).tolist() == [0.5, 0.5]
    strict = c.with_rate(0.25, None)
    assert strict.threshold == math.inf and not strict.is_anomalous(np.array([np.inf])).any()
    assert "nothing is called anomalous" in strict.describe() and "nothing" not in c.describe()
    assert strict.summary()["threshold"] is None


def test_scores_are_sorted_copied_and_fixed() -> None:
    given = np.array([3.0, 1.0, 2.0], dtype=np.float32)
    c = Calibration(given, 0.5, None, "split")
    given[0] = 99
    assert c.scores.tolist() == [1, 2, 3] and c.scores.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        c.scores[0] = 5


@pytest.mark.parametrize("bad", [[0.0, np.nan], [-np.inf], [[1.0]]])
def test_scores_that_are_no_scores_are_refused(bad: list[Any]) -> None:
    c = calibration_of(5)
    for call in (c.p_values, c.is_anomalous, lambda scores: Calibration(scores, 0.05, None, "split")):
        with pytest.raises(CalibrationError, match=r"NaN|-inf|shape \[n\]"):
            call(np.array(bad))
