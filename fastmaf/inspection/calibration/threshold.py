"""Conformal thresholds: the mathematics of a calibration set."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime
from fractions import Fraction
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from scipy.special import betainc, betaincinv

from fastmaf.metrics.results import checked_scores

_CONFIDENCE = 0.95
_SLACK = 1e-12  # relative: rounding must not decide where a binomial tail equals 1 - confidence

_T = TypeVar("_T", bound="ConformalThreshold")


class CalibrationError(ValueError):
    """Invalid calibration data or scores; the message states what was expected and what was found."""


@dataclass(frozen=True, eq=False)
class ConformalThreshold:
    """A threshold taken from scores of normal images; see ``Calibration`` for the fields and the guarantee."""

    scores: np.ndarray
    false_alarm: float
    confidence: float | None
    how: str
    folds: int | None = None
    created: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        scores = np.sort(valid_scores(self.scores, "calibration"))
        if not len(scores):
            raise CalibrationError("a calibration needs the scores of normal images; found none")
        scores.flags.writeable = False
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "false_alarm", _share(self.false_alarm, "false_alarm"))
        if self.confidence is not None:
            object.__setattr__(self, "confidence", _share(self.confidence, "confidence"))
        if self.how == "k-fold":
            object.__setattr__(self, "folds", _fold_count(self.folds, len(scores)))
        elif self.how != "split":
            raise CalibrationError(f'how must be "k-fold" or "split"; found {self.how!r}')
        elif self.folds is not None:
            raise CalibrationError(f'folds must be None where how is "split"; found {self.folds!r}')
        for name, value in (("created", self.created), ("source", self.source)):
            if value is not None and not isinstance(value, str):
                raise CalibrationError(f"{name} must be text or None; found {value!r}")
        if self.created is not None:
            try:
                datetime.fromisoformat(self.created)
            except ValueError:
                raise CalibrationError(f"created must be an ISO date or None; found {self.created!r}") from None

    @property
    def n(self) -> int:
        """The number of calibration images."""
        return len(self.scores)

    @cached_property
    def _attainable_rank(self) -> int | None:
        if self.confidence is None:
            rank = math.ceil((self.n + 1) * (1 - _decimal(self.false_alarm)))
            return rank if rank <= self.n else None
        k = np.arange(1, self.n + 1)
        exceeds = betainc(k, self.n + 1 - k, float(1 - _decimal(self.false_alarm)))  # P(R > alpha), decreasing in k
        fits = exceeds <= float(1 - _decimal(self.confidence)) * (1 + _SLACK)
        return 1 + int(fits.argmax()) if fits.any() else None

    @property
    def rank(self) -> int:
        """k: the threshold is the k-th smallest score."""
        return self.n if self._attainable_rank is None else self._attainable_rank

    @property
    def attainable(self) -> bool:
        """Whether there are enough calibration images for the guarantee."""
        return self._attainable_rank is not None

    @property
    def threshold(self) -> float:
        """The k-th smallest score; if it is +inf, no image is anomalous."""
        return float(self.scores[self.rank - 1])

    @property
    def expected_rate(self) -> float:
        """(n + 1 - k) / (n + 1): the mean false-alarm rate over calibration sets; an upper bound if scores tie."""
        return (self.n + 1 - self.rank) / (self.n + 1)

    @property
    def min_samples(self) -> int:
        """The smallest number of calibration images for which the guarantee is attainable.

        On average ceil(1 / alpha) - 1; with confidence c the smallest n with (1 - alpha)^n <= 1 - c.
        """
        if self.confidence is None:
            return math.ceil(1 / _decimal(self.false_alarm)) - 1
        miss = float(1 - _decimal(self.confidence))
        return max(1, math.ceil((math.log(miss) + _SLACK) / math.log1p(-self.false_alarm)))

    def bound(self, confidence: float = _CONFIDENCE) -> float:
        """Returns the upper bound on this calibration set's false-alarm rate that holds with this probability."""
        return float(betaincinv(self.n + 1 - self.rank, self.rank, _share(confidence, "confidence")))

    def spread(self) -> float:
        """Returns the interquartile range of the finite scores, 0 if there are none."""
        finite = self.scores[np.isfinite(self.scores)]
        return float(np.subtract(*np.quantile(finite, (0.75, 0.25)))) if len(finite) else 0.0

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Returns conformal p-values, p(s) = (1 + #{calibration scores >= s}) / (n + 1).

        p <= ``expected_rate`` iff s > ``threshold``, with or without ties: both mean s_(k) < s. If the guarantee is on
        average and attainable, that is p <= alpha, with alpha read as a decimal number.

        Args:
            scores: [m], +inf allowed.

        Returns:
            float64 [m].

        Raises:
            CalibrationError: a score is NaN or -inf, or the shape differs.
        """
        above = self.n - np.searchsorted(self.scores, valid_scores(scores, "image"), side="left")
        return (1 + above) / (self.n + 1)

    def is_anomalous(self, scores: np.ndarray) -> np.ndarray:
        """Returns which scores [m] are above (not equal to) the threshold, bool [m]; errors as ``p_values``."""
        return valid_scores(scores, "image") > self.threshold

    def with_rate(self: _T, false_alarm: float, confidence: float | None) -> _T:
        """Returns the same scores with another guarantee."""
        return replace(self, false_alarm=false_alarm, confidence=confidence)

    def raised(self: _T) -> _T:
        """Returns a calibration for scores recomputed with different rounding: no image exceeds its own score.

        Each score is raised by 5e-4 of the interquartile range. The guarantee still holds, as no more images are
        anomalous.
        """
        return replace(self, scores=self.scores + 5e-4 * self.spread() + 1e-5 * np.abs(self.scores))


def valid_scores(scores: Any, which: str) -> np.ndarray:
    """Returns scores as float64 [n]; raises a CalibrationError for NaN, -inf and other shapes."""
    try:
        return checked_scores(scores, which)
    except (ValueError, TypeError, OverflowError) as error:
        raise CalibrationError(str(error)) from None


def _fold_count(folds: object, n: int) -> int:
    if isinstance(folds, bool) or not isinstance(folds, (int, np.integer)) or not 2 <= folds <= n:
        raise CalibrationError(f"folds must be a whole number from 2 to {n}, the number of scores; found {folds!r}")
    return int(folds)


def _share(value: Any, name: str) -> float:
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool) or not 0 < value < 1:
        raise CalibrationError(f"{name} must be a number strictly between 0 and 1; found {value!r}")
    return float(value)


def _decimal(share: float) -> Fraction:
    """Returns the decimal number that a float stands for: in floats 100 * (1 - 0.07) exceeds 93."""
    return Fraction(str(share))
