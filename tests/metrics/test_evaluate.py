"""Scores to AUROC, thresholds and reports, against answers worked by hand, brute force and scikit-learn."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from fastmaf.metrics.evaluate import conformal_threshold, evaluate_scores
from fastmaf.metrics.result_files import format_table, to_json, write_metrics
from fastmaf.metrics.results import Evaluation, EvaluationError


def published_confusion() -> Evaluation:
    """Scores of only two values that give the published run's confusion matrix [[12, 11], [8, 101]]."""
    nll = np.array([0.0] * 12 + [1.0] * 11 + [0.0] * 8 + [1.0] * 101)
    return evaluate_scores(nll, ["good"] * 23 + ["crack"] * 60 + ["poke"] * 49, bootstrap=50)


def test_published_confusion_gives_the_published_numbers() -> None:
    e = published_confusion()
    r = e.youden
    assert r.confusion == ((12, 11), (8, 101))
    assert round(r.accuracy, 3) == 0.856 and round(r.baseline_accuracy, 3) == 0.826
    assert [round(v, 2) for v in r.anomaly] == [0.90, 0.93, 0.91]
    assert [round(v, 2) for v in r.normal] == [0.60, 0.52, 0.56]
    assert r.false_alarm_rate == pytest.approx(11 / 23)
    assert r.alarms == {"good": 11, "crack": 52, "poke": 49}
    assert e.auroc == pytest.approx((101 * 12 + (101 * 11 + 8 * 12) / 2) / (109 * 23))
    assert "optimistic" in r.how and r.inclusive


def test_small_case_by_hand() -> None:
    # normals 1 2 3 4, defects 3 5 6: pairs won 2.5 + 4 + 4 of 12; J is largest at 5 (2/3 - 0)
    e = evaluate_scores(
        np.array([1, 2, 3, 4, 3, 5, 6.0]), ["good"] * 4 + ["b", "a", "a"], held_out_nll=np.arange(19.0) / 5, features=3
    )
    assert e.auroc == pytest.approx(10.5 / 12)
    assert e.youden.threshold == 5 and e.youden.confusion == ((4, 0), (1, 2))
    assert list(e.counts) == ["good", "a", "b"] and (e.n_normal, e.n_anomalous) == (4, 3)
    assert e.per_class["a"].auroc == 1 and e.per_class["b"].auroc == pytest.approx(2.5 / 4)
    assert e.per_class["good"].auroc is None
    good = e.per_class["good"]
    assert (good.n, good.mean, good.median) == (4, 2.5, 2.5) and good.std == pytest.approx(math.sqrt(1.25))
    assert e.held_out is not None and e.held_out_reason is None
    assert e.held_out.threshold == pytest.approx(3.6)  # the 19th of 19
    assert e.held_out.confusion == ((3, 1), (1, 2)) and e.held_out.promised_rate == 0.05
    assert e.bits_per_dim(3 * math.log(2)) == pytest.approx(1)
    np.testing.assert_allclose(e.roc.fpr, [0, 0, 0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(e.roc.tpr, [0, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1])
    np.testing.assert_array_equal(e.roc.thresholds, [np.inf, 6, 5, 4, 3, 2, 1])


def test_youden_alarms_at_its_threshold_and_conformal_only_above() -> None:
    nll = np.array([0.0, 1.0, 1.0])
    e = evaluate_scores(nll, ["good", "crack", "crack"], held_out_nll=np.array([1.0]), false_alarm=0.5)
    assert e.youden.threshold == 1 and e.youden.is_anomalous(nll).tolist() == [False, True, True]
    assert e.held_out is not None and e.held_out.threshold == 1
    assert e.held_out.is_anomalous(nll).tolist() == [False, False, False]
    assert e.held_out.anomaly == (0, 0, 0)  # nothing called anomalous: zero, no warning


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_sklearn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    digits = seed % 3  # with few digits, many ties
    nll = np.concatenate([rng.normal(0, 1, 23), rng.normal(0.8, 2, 60)]).round(digits)
    defect = np.arange(83) >= 23
    e = evaluate_scores(nll, np.where(defect, "crack", "good").tolist(), bootstrap=0)
    assert e.auroc == pytest.approx(roc_auc_score(defect, nll), abs=1e-14)
    assert e.auroc_interval is None
    fpr, tpr, thresholds = sklearn_roc_curve(defect, nll, drop_intermediate=False)
    np.testing.assert_allclose(e.roc.fpr, fpr)
    np.testing.assert_allclose(e.roc.tpr, tpr)
    assert e.youden.threshold == thresholds[np.argmax(tpr - fpr)]


def test_worse_than_chance_has_a_threshold() -> None:
    e = evaluate_scores(np.array([2.0, 3.0, 0.0, 1.0]), ["good", "good", "x", "x"], bootstrap=0)
    assert e.auroc == 0 and e.youden.threshold == 0 and e.youden.confusion == ((0, 2), (0, 2))


def test_all_scores_equal() -> None:
    e = evaluate_scores(np.zeros(6), ["good"] * 3 + ["x"] * 3)
    assert e.auroc == 0.5 and e.auroc_interval == (0.5, 0.5) and e.youden.threshold == 0


def test_infinite_scores_are_the_most_anomalous(tmp_path: Path) -> None:
    nll = np.array([1.0, 2.0, np.inf, np.inf, 1.5])
    labels = ["good", "good", "x", "x", "y"]
    e = evaluate_scores(nll, labels, features=4, held_out_nll=np.array([1.0, np.inf]))
    assert e.auroc == pytest.approx(5 / 6)
    assert e.per_class["x"].auroc == 1 and e.per_class["x"].mean == math.inf and math.isnan(e.per_class["x"].std)
    assert e.youden.threshold == math.inf and e.youden.confusion == ((2, 0), (1, 2))
    assert e.held_out is not None and e.held_out.threshold == math.inf and "infinite" in e.held_out.how
    assert e.held_out.confusion == ((2, 0), (3, 0))
    write_metrics(tmp_path / "m.json", e)
    content = json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail)  # no bare Infinity or NaN
    assert content["per_class"]["x"]["mean"] == content["per_class"]["x"]["mean_bits_per_dim"] == "inf"
    assert content["per_class"]["x"]["std"] is None
    assert "inf" in format_table(e)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.07, 0.1, 0.13, 0.2, 0.29, 1 / 3, 0.5, 0.9])
def test_conformal_rank_against_brute_force(alpha: float) -> None:
    rng = np.random.default_rng(1)
    exact = Fraction(str(alpha))
    for n in range(1, 131):
        scores = rng.normal(-4e4, 2e3, n)
        fitting = [k for k in range(1, n + 1) if Fraction(k, n + 1) >= 1 - exact]
        threshold, how, guaranteed, _ = conformal_threshold(scores, alpha)
        assert threshold == np.sort(scores)[fitting[0] - 1 if fitting else -1]
        assert guaranteed == (alpha if fitting else 1 / (n + 1))
        assert ("too few" in how) is (not fitting) and bool(fitting) == (n >= 1 / exact - 1)
        assert "no label of the test set was used" in how


@pytest.mark.parametrize(("n", "alpha"), [(22, 0.05), (24, 0.05), (99, 0.1), (9, 0.05)])
def test_conformal_coverage(n: int, alpha: float) -> None:
    """The false-alarm rate on a new exchangeable normal is (n+1-k)/(n+1) <= the guaranteed rate, for the rank k.

    4000 independent held-out sets, uniform scores, so the alarm rate given a set is exactly 1 - threshold. Its mean
    over the sets has a standard deviation below 0.1 / sqrt(4000) = 0.0016; the share of sets below rate_95 has 0.0034.
    Both tolerances are more than four of them.
    """
    rng = np.random.default_rng(n)
    results = [conformal_threshold(rng.uniform(size=n), alpha) for _ in range(4000)]
    rates = 1 - np.array([threshold for threshold, *_ in results])
    _, _, guaranteed, rate_95 = results[0]
    expected = max(1, math.floor((n + 1) * alpha + 1e-9)) / (n + 1)
    assert expected <= guaranteed + 1e-12
    assert abs(rates.mean() - expected) < 0.0065
    assert abs((rates <= rate_95).mean() - 0.95) < 0.014


def test_rate_95_of_the_largest_of_n() -> None:
    # P(the largest of n has more than p above it) = (1 - p)^n
    assert conformal_threshold(np.arange(22.0), 0.01)[3] == pytest.approx(1 - 0.05 ** (1 / 22))


@pytest.mark.parametrize(
    ("nll", "labels", "options", "parts"),
    [
        ([1.0, 2.0], ["crack", "poke"], {}, ["no good", "crack 1, poke 1"]),
        ([1.0, 2.0], ["good", "good"], {}, ["no defective ones", "good 2"]),
        ([1.0, 2.0], ["Good", "crack"], {}, ["no good", "Good 1"]),
        ([], [], {}, ["found no good ones"]),
        ([1.0, 2.0, 3.0], ["good", "x"], {}, ["3 scores", "2 labels"]),
        ([[1.0], [2.0]], ["good", "x"], {}, ["[2, 1]"]),
        ([1.0, math.nan, math.nan], ["good", "x", "x"], {}, ["2 of 3", "NaN", "x 2", "index 1"]),
        ([1.0, -math.inf], ["good", "x"], {}, ["1 of 2", "-inf"]),
        ([1.0, 2.0], ["good", "x"], {"held_out_nll": np.array([math.nan])}, ["1 of 1 held-out", "NaN"]),
        ([1.0, 2.0], ["good", "x"], {"false_alarm": 5}, ["false_alarm", "5"]),
        ([1.0, 2.0], ["good", "x"], {"bootstrap": -1}, ["bootstrap", "-1"]),
        ([1.0, 2.0], ["good", "x"], {"features": 0}, ["features", "0"]),
    ],
)
def test_errors(nll: list, labels: list[str], options: dict, parts: list[str]) -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluate_scores(np.array(nll), labels, **options)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(("held_out", "reason"), [(None, "no held-out good images"), (np.array([]), "empty")])
def test_missing_held_out_set_is_reported(held_out: np.ndarray | None, reason: str) -> None:
    e = evaluate_scores(np.array([1.0, 2.0]), ["good", "x"], held_out_nll=held_out)
    assert e.held_out is None and e.held_out_reason is not None and reason in e.held_out_reason
    assert e.held_out_reason in format_table(e) and to_json(e)["held_out"] is None
