"""Scores to AUROC, thresholds and reports, against answers worked by hand, brute force and scikit-learn."""

from __future__ import annotations

import csv
import json
import math
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from fastmaf.metrics.auroc import auroc
from fastmaf.metrics.evaluate import conformal_threshold, evaluate_scores
from fastmaf.metrics.result_files import format_table, to_json, write_metrics, write_scores
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


def test_auroc_ranks_in_float64() -> None:
    # every defect 1e-6 nats above a normal; in float32, whose step at 4e4 is 0.004, all would be tied
    normal = -41545.0 + np.arange(20) * 2e-6
    nll = np.concatenate([normal, normal + 1e-6])
    defect = np.arange(40) >= 20
    wins = sum(d > g for d in nll[20:] for g in nll[:20])
    assert len(np.unique(nll)) == 40 and wins == 210
    assert auroc(nll, defect) == wins / 400
    assert auroc(nll.astype(np.float32), defect) == 0.5


def test_worse_than_chance_still_has_a_threshold() -> None:
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
        threshold, how, promised, _ = conformal_threshold(scores, alpha)
        assert threshold == np.sort(scores)[fitting[0] - 1 if fitting else -1]
        assert promised == (alpha if fitting else 1 / (n + 1))
        assert ("too few" in how) is (not fitting) and bool(fitting) == (n >= 1 / exact - 1)
        assert "no label of the test set was used" in how


@pytest.mark.parametrize(("n", "alpha"), [(22, 0.05), (24, 0.05), (99, 0.1), (9, 0.05)])
def test_conformal_coverage(n: int, alpha: float) -> None:
    """Alarms on a new exchangeable normal come at (n+1-k)/(n+1) <= the promise, k the rank used.

    4000 independent held-out sets, uniform scores, so the alarm rate given a set is exactly 1 - threshold. Its mean
    over the sets has a standard deviation below 0.1 / sqrt(4000) = 0.0016; the share of sets below rate_95 has 0.0034.
    Both are given more than four of them.
    """
    rng = np.random.default_rng(n)
    found = [conformal_threshold(rng.uniform(size=n), alpha) for _ in range(4000)]
    rates = 1 - np.array([threshold for threshold, *_ in found])
    _, _, promised, rate_95 = found[0]
    expected = max(1, math.floor((n + 1) * alpha + 1e-9)) / (n + 1)
    assert expected <= promised + 1e-12
    assert abs(rates.mean() - expected) < 0.0065
    assert abs((rates <= rate_95).mean() - 0.95) < 0.014


def test_rate_95_of_the_largest_of_n() -> None:
    # P(the largest of n has more than p above it) = (1 - p)^n
    assert conformal_threshold(np.arange(22.0), 0.01)[3] == pytest.approx(1 - 0.05 ** (1 / 22))


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


@pytest.mark.parametrize(
    ("nll", "labels", "options", "words"),
    [
        ([1.0, 2.0], ["crack", "poke"], {}, ["no normal", "crack 1, poke 1"]),
        ([1.0, 2.0], ["good", "good"], {}, ["no defect", "good 2"]),
        ([1.0, 2.0], ["Good", "crack"], {}, ["no normal", "Good 1"]),
        ([], [], {}, ["no images at all"]),
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
def test_errors_say_what_was_found(nll: list, labels: list[str], options: dict, words: list[str]) -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluate_scores(np.array(nll), labels, **options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(("held_out", "words"), [(None, "no scores"), (np.array([]), "empty")])
def test_missing_held_out_set_is_said(held_out: np.ndarray | None, words: str) -> None:
    e = evaluate_scores(np.array([1.0, 2.0]), ["good", "x"], held_out_nll=held_out)
    assert e.held_out is None and e.held_out_reason is not None and words in e.held_out_reason
    assert e.held_out_reason in format_table(e) and to_json(e)["held_out"] is None


def test_scores_file(tmp_path: Path) -> None:
    nll = np.array([-41545.123456789, -40000.1, 1.9e6])
    labels = ["good", "crack, deep", "poke"]
    paths: list[str | Path] = [Path("test/good/000.png"), "test/crack, deep/ä 1.png", "test/poke/\udcff.png"]
    e = evaluate_scores(nll, labels, held_out_nll=np.full(19, -40000.1), features=12288)
    target = tmp_path / "new" / "scores.csv"
    write_scores(target, paths, labels, nll, e, 12288)
    with open(target, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "label", "nll", "bits_per_dim", "anomalous_youden", "anomalous_held_out"]
    assert [row["file"] for row in rows] == [str(p) for p in paths] and [row["label"] for row in rows] == labels
    assert [float(row["nll"]) for row in rows] == nll.tolist()
    assert float(rows[0]["bits_per_dim"]) == pytest.approx(-41545.123456789 / 12288 / math.log(2))
    assert [row["anomalous_youden"] for row in rows] == ["0", "1", "1"]
    assert [row["anomalous_held_out"] for row in rows] == ["0", "0", "1"]
    without = evaluate_scores(nll, labels)
    write_scores(target, paths, labels, nll, without, 12288)
    assert all(line.endswith(",") for line in target.read_bytes().decode("utf-8", "replace").splitlines()[1:])
    with pytest.raises(EvaluationError, match="3 scores and 2 files"):
        write_scores(target, paths[:2], labels, nll, e, 12288)
    assert [p.name for p in target.parent.iterdir()] == ["scores.csv"]


def test_metrics_file_holds_everything_and_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    e = published_confusion()
    target = tmp_path / "metrics.json"
    extra = {"model": Path("m.safetensors"), "seconds": np.float32(1.5), "worst": math.nan, "settings": {"lr": 1e-4}}
    write_metrics(target, e, extra)
    content = json.loads(target.read_text())
    assert content["youden"]["confusion"] == [[12, 11], [8, 101]]
    assert content["youden"]["anomaly"]["recall"] == pytest.approx(101 / 109)
    assert content["counts"] == {"good": 23, "crack": 60, "poke": 49} and content["n_anomalous"] == 109
    assert content["auroc"] == e.auroc and content["roc"]["thresholds"] == ["inf", 1.0, 0.0]
    assert content["model"] == "m.safetensors" and content["seconds"] == 1.5 and content["worst"] is None
    assert content["settings"] == {"lr": 1e-4}
    assert json.loads(json.dumps(to_json(e))) == to_json(e)
    with pytest.raises(EvaluationError, match="auroc"):
        write_metrics(target, e, {"auroc": 1})

    def fail(*_: object) -> None:
        raise OSError("no space left")

    before = target.read_bytes()
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_metrics(target, e, {"n": 2})
    assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_table_shows_the_numbers_and_fits_a_terminal() -> None:
    rng = np.random.default_rng(0)
    nll = np.concatenate([rng.normal(-41545, 1602, 23), rng.normal(-39000, 2e3, 108), [1.9e6]])
    labels = ["good"] * 23 + ["crack"] * 54 + ["faulty_imprint"] * 55
    e = evaluate_scores(nll, labels, held_out_nll=nll[:23] + 10, features=12288)
    text = format_table(e)
    assert all(len(line) <= 110 for line in text.splitlines())
    interval = e.auroc_interval
    assert interval is not None and f"AUROC {e.auroc:.4f}" in text and f"{interval[0]:.3f} to {interval[1]:.3f}" in text
    for report in (e.youden, e.held_out):
        assert report is not None
        assert f"accuracy {report.accuracy:.3f}" in text and f"{report.threshold:,.2f}" in text
        assert " ".join(report.how.split()) in " ".join(text.split())
    assert "faulty_imprint" in text and f"{e.per_class['good'].mean:,.0f}" in text
