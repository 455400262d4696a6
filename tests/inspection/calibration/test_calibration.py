from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from fastmaf.inspection.calibration import Calibration, CalibrationError
from tests.inspection.tiny import calibration_of


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"false_alarm": 0}, "false_alarm: .* found 0"),
        ({"false_alarm": 10**400}, "false_alarm: .* found 1000"),
        ({"false_alarm": 1.0}, "false_alarm: .* found 1.0"),
        ({"false_alarm": math.nan}, "false_alarm: .* found nan"),
        ({"false_alarm": "0.05"}, "false_alarm: .* found '0.05'"),
        ({"false_alarm": None}, "false_alarm: .* found None"),
        ({"confidence": 1}, "confidence: .* found 1"),
        ({"confidence": True}, "confidence: .* found True"),
        ({"how": "jackknife"}, "how: expected one of 'k-fold', 'split'; found 'jackknife'"),
        ({"how": "split"}, "folds must be None"),
        ({"folds": None}, "folds: .* found None"),
        ({"folds": 1}, "folds: .* found 1"),
        ({"folds": 6}, "folds: expected a whole number from 2 to 5; found 6"),
        ({"folds": 2.0}, "folds: .* found 2.0"),
        ({"created": "yesterday"}, "ISO date .* found 'yesterday'"),
        ({"created": 20250301}, "created: expected text"),
        ({"source": ["x"]}, "source: expected text"),
        ({"colour": 1}, "unknown entry 'colour'"),
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, Any], message: str) -> None:
    calibration = Calibration(np.arange(5.0), 0.05, 0.9, "k-fold", 5, "2025-03-01", "x")
    with pytest.raises(CalibrationError, match=message):
        Calibration.from_json({**calibration.to_json(), **change}, calibration.scores)


@pytest.mark.parametrize(
    ("scores", "message"),
    [([], "found none"), ([1, 3, 2], "found 2 after 3 at index 2"), ([1, math.nan], "NaN"), ([[1.0]], r"shape \[n\]")],
)
def test_damaged_scores_are_refused(scores: list[Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Calibration.from_json(calibration_of(5).to_json(), np.array(scores, dtype=np.float64))


def test_a_record_of_another_kind_is_refused() -> None:
    calibration = calibration_of(5)
    record = calibration.to_json()
    with pytest.raises(CalibrationError, match=r"calibration: expected an object; found \[\]"):
        Calibration.from_json([], calibration.scores)  # type: ignore[arg-type]
    for name in record:
        with pytest.raises(CalibrationError, match=f"the entry '{name}' is missing"):
            Calibration.from_json({key: value for key, value in record.items() if key != name}, calibration.scores)
    with pytest.raises(CalibrationError, match="unknown entry 'scores'"):
        Calibration.from_json({**record, "scores": [1.0]}, calibration.scores)


@pytest.mark.parametrize("confidence", [None, 0.95])
def test_round_trip(confidence: float | None) -> None:
    scores = np.append(np.random.default_rng(0).normal(-4e4, 2e3, 70), np.inf)
    created = "2025-03-01T12:30:00+00:00"
    calibration = Calibration(scores, np.float64(0.07), confidence, "k-fold", 5, created, "Straße 7")
    text = json.dumps(calibration.to_json(), allow_nan=False)
    loaded = Calibration.from_json(json.loads(text), calibration.scores)
    assert np.array_equal(loaded.scores, calibration.scores) and loaded.to_json() == calibration.to_json()
    assert (loaded.threshold, loaded.describe()) == (calibration.threshold, calibration.describe())


def test_with_rate_keeps_the_rest() -> None:
    calibration = Calibration(np.arange(300.0), 0.05, None, "k-fold", 5, "2025-03-01", "x")
    changed = calibration.with_rate(0.01, 0.95)
    assert calibration.rank == 286 and changed.rank == 300 and changed.attainable
    assert {**calibration.to_json(), "false_alarm": 0.01, "confidence": 0.95} == changed.to_json()
    for rate, confidence in ((0, None), (0.05, 0.0)):
        with pytest.raises(CalibrationError, match="expected a finite number .*less than 1.*; found 0"):
            calibration.with_rate(rate, confidence)


def test_summary_is_json() -> None:
    calibration = Calibration(np.append(np.arange(1.0, 219), np.inf), 0.05, None, "k-fold", 5, "2025-03-01", "line 3")
    for case in (calibration, calibration.with_rate(0.01, 0.95)):
        summary = case.summary()
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
        for name in ("rank", "n", "expected_rate", "false_alarm", "confidence", "attainable", "min_samples", "folds"):
            assert summary[name] == getattr(case, name)
        assert summary["bound_95"] == case.bound()
    assert calibration.summary()["threshold"] == calibration.threshold == 209
