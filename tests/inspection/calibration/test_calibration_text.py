"""A calibration in words."""

from __future__ import annotations

import numpy as np
import pytest

from fastmaf.inspection.calibration import Calibration
from tests.inspection.tiny import calibration_of

FOLDS = Calibration(np.arange(1.0, 244), 0.05, None, "k-fold", 5, "2025-03-01", "line 3")


def test_short_form() -> None:
    assert FOLDS.describe().splitlines() == [
        "the 232nd lowest of the 243 held-out scores, 232, is the threshold; images above it are called anomalous",
        "expected false alarms: 4.92% on average; at most 7.38% for this calibration set, with 95% confidence",
        "for at most 5% with 95% confidence, calibrate with --confidence 0.95 "
        "(threshold 237; needs 59 calibration images, 243 available)",
        "the assumptions behind these rates: --explain, or describe(explain=True) in Python",
    ]


def test_explained_form() -> None:
    text = FOLDS.describe(explain=True)
    assert text.startswith("\n".join(FOLDS.describe().splitlines()[:2])) and "--explain" not in text
    for part in (
        "guarantee: at most 5% false alarms on average (needs 19 calibration images, 243 available)",
        "(threshold 237; needs 59 calibration images, 243 available)",
        "243 good images (line 3, 2025-03-01), each scored by a model fitted without its fold (5 folds)",
        "new good images come from the same process as the calibration images",
        "fastmaf inspect recalibrate",
        "not proven",
        "about twice the rate, 10%",
    ):
        assert part in text
    assert all(0 < len(line) <= 140 for line in text.splitlines())


def test_a_guarantee_that_cannot_be_given() -> None:
    text = FOLDS.with_rate(0.01, 0.95).describe()
    assert "the highest of the 243 held-out scores, 243, is the threshold" in text
    assert (
        "at most 1% false alarms with 95% confidence cannot be guaranteed (this needs 299 calibration images, "
        "243 available); the highest score is the threshold instead"
    ) in text
    assert "calibrate with" not in text and "guarantee:" not in text


def test_a_split() -> None:
    calibration = Calibration(np.arange(30.0), 0.05, None, "split")
    assert "the highest of the 30 calibration scores" in calibration.describe()
    assert "--confidence 0.95 (needs 59 calibration images, 30 available)" in calibration.describe()
    text = calibration.describe(explain=True)
    assert "30 good images, scored by one model that was not fitted to them" in text and "fold" not in text


def test_another_confidence() -> None:
    assert "(8.8% with 99%)" in calibration_of(50, 0.05, 0.99).describe()
    assert "99" not in calibration_of(50, 0.05, 0.95).describe()
    strict = calibration_of(100, 0.05, 0.95).describe()
    assert (
        "guarantee: at most 5% false alarms with 95% confidence (needs 59 calibration images, 100 available)" in strict
    )


@pytest.mark.parametrize(
    ("n", "alpha", "place"),
    [
        (1, 0.5, "the score of the only calibration image, 1, is"),
        (2, 0.9, "the lowest of the 2 calibration scores, 1, is"),
        (20, 0.9, "the 3rd lowest of the 20 calibration scores, 3, is"),
        (99, 0.05, "the 95th lowest of the 99 calibration scores, 95, is"),
        (1200, 0.05, "the 1,141st lowest of the 1,200 calibration scores, 1141, is"),
    ],
)
def test_the_rank_of_the_threshold(n: int, alpha: float, place: str) -> None:
    assert calibration_of(n, alpha).describe().startswith(place)
