"""A threshold with a promise: conformal calibration of anomaly scores, from normals alone.

No model in here: scores in, a `Calibration` out, which gives thresholds, p-values and what may be expected of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import betainc, betaincinv

from fastmaf.inspection.calibration_text import described
from fastmaf.metrics.results import checked_scores

__all__ = ["Calibration", "CalibrationError", "k_fold"]

_CONFIDENCE = 0.95
_SLACK = 1e-12  # relative: where a binomial tail equals 1 - confidence, rounding shall not decide


class CalibrationError(ValueError):
    """A calibration, or scores put to it, that cannot be used; the message says what was expected and found."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of normals and the threshold taken from them; an image is anomalous iff its score is above it.

    With n scores s_(1) <= ... <= s_(n), the threshold is s_(k), and for normals exchangeable with these the rate R of
    false alarms is at most Beta(n + 1 - k, k) distributed over calibration sets; exactly so where scores have no ties.

    - On average (``confidence`` is None): k = ceil((n + 1)(1 - alpha)), the smallest with E[R] <= alpha.
    - For this calibration set: k is the smallest with P(R <= alpha) >= ``confidence``.

    Where no k <= n fits, k = n and the promise is not ``met``. All this holds for "split"; for "k-fold" it is an
    approximation, as the model that gives the verdicts is none of those that gave the scores: see ``describe``.

    Attributes:
        scores: float64 [n], n >= 1, ascending (sorted here if they are not), finite or +inf; read-only. Of normals that
            the model which scored them has not seen.
        false_alarm: alpha, the rate of false alarms asked for, in (0, 1).
        confidence: in (0, 1), or None for a promise on average over calibration sets.
        how: "k-fold", each normal scored by the model of the fold that left it out, or "split", all by one model.
        folds: K for "k-fold", else None.
        created: an ISO date, with or without time, or None.
        source: where the normals come from, in a few words, or None.

    Raises:
        CalibrationError: a field is of another kind.

    References:
        Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World; Papadopoulos 2008 (split conformal).
        Vovk 2012, Conditional validity of inductive conformal predictors (the Beta distribution).
    """

    scores: np.ndarray
    false_alarm: float
    confidence: float | None
    how: str
    folds: int | None = None
    created: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        scores = np.sort(_checked(self.scores, "calibration"))
        if not len(scores):
            raise CalibrationError("a calibration needs the scores of normals; found none")
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
        """How many normals there are."""
        return len(self.scores)

    @cached_property
    def _fitting_rank(self) -> int | None:
        if self.confidence is None:
            rank = math.ceil((self.n + 1) * (1 - _decimal(self.false_alarm)))
            return rank if rank <= self.n else None
        k = np.arange(1, self.n + 1)
        above = betainc(k, self.n + 1 - k, float(1 - _decimal(self.false_alarm)))  # P(R > alpha), falling with k
        fitting = above <= float(1 - _decimal(self.confidence)) * (1 + _SLACK)
        return 1 + int(fitting.argmax()) if fitting.any() else None

    @property
    def rank(self) -> int:
        """k: the threshold is the k-th smallest score."""
        return self.n if self._fitting_rank is None else self._fitting_rank

    @property
    def met(self) -> bool:
        """Whether there are enough normals for the promise asked for."""
        return self._fitting_rank is not None

    @property
    def threshold(self) -> float:
        """The k-th smallest score, which may be +inf: then nothing is anomalous."""
        return float(self.scores[self.rank - 1])

    @property
    def expected_rate(self) -> float:
        """(n + 1 - k) / (n + 1): the rate of false alarms on average over calibration sets; with ties, at most that."""
        return (self.n + 1 - self.rank) / (self.n + 1)

    @property
    def needed(self) -> int:
        """How many normals the promise takes at least.

        On average ceil(1 / alpha) - 1; with confidence c the smallest n with (1 - alpha)^n <= 1 - c.
        """
        if self.confidence is None:
            return math.ceil(1 / _decimal(self.false_alarm)) - 1
        miss = float(1 - _decimal(self.confidence))
        return max(1, math.ceil((math.log(miss) + _SLACK) / math.log1p(-self.false_alarm)))

    def bound(self, confidence: float = _CONFIDENCE) -> float:
        """Returns the rate that this calibration set's false alarms do not exceed, with that probability."""
        return float(betaincinv(self.n + 1 - self.rank, self.rank, _share(confidence, "confidence")))

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """How often a normal scores at least as high: p(s) = (1 + #{calibration scores >= s}) / (n + 1).

        p <= ``expected_rate`` iff s > ``threshold``, with or without ties: both say that s_(k) < s. Where the promise
        is on average and met, that is p <= alpha, with alpha the decimal that was meant.

        Args:
            scores: [m], +inf allowed.

        Returns:
            float64 [m].

        Raises:
            CalibrationError: a score is NaN or -inf, or the shape is another.
        """
        above = self.n - np.searchsorted(self.scores, _checked(scores, "image"), side="left")
        return (1 + above) / (self.n + 1)

    def is_anomalous(self, scores: np.ndarray) -> np.ndarray:
        """Bool [m]: which scores [m] are above the threshold; a score equal to it is not. Raises as ``p_values``."""
        return _checked(scores, "image") > self.threshold

    def with_rate(self, false_alarm: float, confidence: float | None) -> Calibration:
        """Returns the same scores with another promise."""
        return replace(self, false_alarm=false_alarm, confidence=confidence)

    def raised(self) -> Calibration:
        """Returns a calibration for scores that differ from these in their last digits: each is raised by 5e-4 of the
        interquartile range, so that no image is above its own score. The promise still holds, as no more images are
        anomalous.
        """
        finite = self.scores[np.isfinite(self.scores)]
        spread = float(np.subtract(*np.quantile(finite, (0.75, 0.25)))) if len(finite) else 0.0
        return replace(self, scores=self.scores + 5e-4 * spread + 1e-5 * np.abs(self.scores))

    def describe(self) -> str:
        """What was done, what may be expected and what it assumes: lines of plain text, a sentence or two each."""
        return described(self)

    def to_json(self, with_scores: bool = True) -> dict[str, Any]:
        """Returns the fields in types of JSON, an infinite score as "inf"; without scores, the caller keeps them."""
        data = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "scores"}
        if with_scores:
            data["scores"] = ["inf" if math.isinf(score) else score for score in self.scores.tolist()]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any], scores: np.ndarray | None = None) -> Calibration:
        """Reads what ``to_json`` made.

        Args:
            data: the fields, with "scores" iff ``scores`` are not given.
            scores: [n], kept by the caller.

        Raises:
            CalibrationError: a field is missing, unknown or of another kind, or the scores are not ascending.
        """
        if not isinstance(data, Mapping):
            raise CalibrationError(f"a calibration must be a mapping; found {type(data).__name__}")
        expected = {item.name for item in fields(cls)} - ({"scores"} if scores is not None else set())
        if set(data) != expected:
            names = ", ".join(sorted(map(str, data))) or "nothing"
            raise CalibrationError(f"a calibration must have the fields {', '.join(sorted(expected))}; found {names}")
        listed: Any = data["scores"] if scores is None else scores
        if scores is None:
            if not isinstance(listed, list):
                raise CalibrationError(f"scores must be a list of numbers; found {type(listed).__name__}")
            odd = [item for item in listed if item != "inf" and type(item) not in (int, float)]
            if odd:
                raise CalibrationError(f'scores must be numbers or "inf"; found {odd[0]!r}')
        scores = _checked(listed, "calibration")
        if (scores[1:] < scores[:-1]).any():
            first = int(np.argmax(scores[1:] < scores[:-1])) + 1
            found = f"{scores[first]:g} after {scores[first - 1]:g} at index {first}"
            raise CalibrationError(f"scores must ascend; found {found}")
        return cls(**{**data, "scores": scores})


def k_fold(n: int, folds: int, seed: int = 0) -> list[np.ndarray]:
    """Deals 0..n-1 into folds at random: their sizes differ by one at most, and indices ascend within each.

    Raises:
        CalibrationError: folds are fewer than 2 or more than n.
    """
    order = np.random.default_rng(seed).permutation(n)
    return [np.sort(fold) for fold in np.array_split(order, _fold_count(folds, n))]


def _fold_count(folds: object, n: int) -> int:
    if isinstance(folds, bool) or not isinstance(folds, (int, np.integer)) or not 2 <= folds <= n:
        raise CalibrationError(f"folds must be a whole number from 2 to the {n} normals there are; found {folds!r}")
    return int(folds)


def _share(value: Any, name: str) -> float:
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool) or not 0 < value < 1:
        raise CalibrationError(f"{name} must be a number strictly between 0 and 1; found {value!r}")
    return float(value)


def _decimal(share: float) -> Fraction:
    """The decimal that was meant: in floats 100 * (1 - 0.07) exceeds 93."""
    return Fraction(str(share))


def _checked(scores: Any, which: str) -> np.ndarray:
    try:
        return checked_scores(scores, which)
    except (ValueError, TypeError, OverflowError) as error:
        raise CalibrationError(str(error)) from None
