"""Conformal calibration of anomaly scores from good images alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import betainc, betaincinv

from fastmaf.inspection.calibration_text import describe_calibration
from fastmaf.inspection.scoring.settings import check_fields
from fastmaf.io.safe_json import finite
from fastmaf.io.schema import Maybe, Number, OneOf, Record, SchemaError, Text, Whole
from fastmaf.metrics.evaluate import conformal_rank, decimal
from fastmaf.metrics.results import checked_scores

_SLACK = 1e-12  # relative: rounding must not decide where a binomial tail equals 1 - confidence
_SHARE = Number(above=0, below=1)

CALIBRATION = Record(
    {
        "false_alarm": Number(low=1e-12, below=1),
        "confidence": Maybe(_SHARE),
        "how": OneOf(("k-fold", "split")),
        "folds": Maybe(Whole(2)),
        "created": Maybe(Text(60)),
        "source": Maybe(Text()),
    }
)


class CalibrationError(ValueError):
    """Invalid calibration data or scores; the message states what was expected and what was found."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of good images and the threshold taken from them; an image is anomalous iff its score is above it.

    With n scores s_(1) <= ... <= s_(n), the threshold is s_(k). For good images exchangeable with these, the
    false-alarm rate R of a calibration set is at most Beta(n + 1 - k, k) distributed; exactly so if scores do not tie.

    - On average (``confidence`` is None): k = ceil((n + 1)(1 - alpha)), the smallest with E[R] <= alpha.
    - For this calibration set: k is the smallest with P(R <= alpha) >= ``confidence``.

    If no k <= n fits, k = n and the guarantee is not ``attainable``. All this holds for "split". For "k-fold" it is an
    approximation, as the model that gives the verdicts is none of those that gave the scores: see ``describe``.

    Attributes:
        scores: float64 [n], n >= 1, ascending (sorted here if they are not), finite or +inf; read-only. Of normal
            images that the model that scored them has not seen.
        false_alarm: alpha, the requested false-alarm rate, in (0, 1).
        confidence: in (0, 1), or None for a guarantee on average over calibration sets.
        how: "k-fold", each image scored by the model of the fold that left it out, or "split", all by one model.
        folds: K for "k-fold", else None.
        created: an ISO date, with or without time, or None.
        source: where the images come from, in a few words, or None.

    Raises:
        CalibrationError: a field has another type or is out of range.

    References:
        Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World; Papadopoulos 2008 (split conformal).
        Vovk 2012, Conditional validity of inductive conformal predictors (the Beta distribution).

    Example:
        >>> import numpy as np
        >>> from fastmaf.inspection.calibration import Calibration
        >>> calibration = Calibration(np.arange(1.0, 100.0), false_alarm=0.05, confidence=None, how="split")
        >>> calibration.threshold, calibration.attainable, calibration.min_samples
        (95.0, True, 19)
    """

    scores: np.ndarray
    false_alarm: float
    confidence: float | None
    how: str
    folds: int | None = None
    created: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        scores = np.sort(_valid_scores(self.scores, "calibration"))
        if not len(scores):
            raise CalibrationError("a calibration needs the scores of good images; found none")
        scores.flags.writeable = False
        object.__setattr__(self, "scores", scores)
        try:
            check_fields(self, CALIBRATION, "calibration")
            if self.how == "k-fold":
                Whole(2, len(scores)).check(self.folds, "calibration.folds")
        except SchemaError as error:
            raise CalibrationError(str(error)) from None
        if self.how == "split" and self.folds is not None:
            raise CalibrationError(f'calibration.folds must be None where how is "split"; found {self.folds!r}')
        if self.created is not None:
            try:
                datetime.fromisoformat(self.created)
            except ValueError:
                found = f"found {self.created!r}"
                raise CalibrationError(f"calibration.created must be an ISO date or None; {found}") from None

    @property
    def n(self) -> int:
        """The number of calibration images."""
        return len(self.scores)

    @cached_property
    def _attainable_rank(self) -> int | None:
        if self.confidence is None:
            rank, _ = conformal_rank(self.n, self.false_alarm)
            return rank if rank <= self.n else None
        k = np.arange(1, self.n + 1)
        exceeds = betainc(k, self.n + 1 - k, float(1 - decimal(self.false_alarm)))  # P(R > alpha), decreasing in k
        fits = exceeds <= float(1 - decimal(self.confidence)) * (1 + _SLACK)
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
            return conformal_rank(self.n, self.false_alarm)[1]
        miss = float(1 - decimal(self.confidence))
        return max(1, math.ceil((math.log(miss) + _SLACK) / math.log1p(-self.false_alarm)))

    def bound(self, confidence: float = 0.95) -> float:
        """Returns the upper bound on this calibration set's false-alarm rate that holds with this probability.

        Raises:
            CalibrationError: ``confidence`` is not a number between 0 and 1.
        """
        try:
            _SHARE.check(confidence, "confidence")
        except SchemaError as error:
            raise CalibrationError(str(error)) from error
        return float(betaincinv(self.n + 1 - self.rank, self.rank, confidence))

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
        above = self.n - np.searchsorted(self.scores, _valid_scores(scores, "image"), side="left")
        return (1 + above) / (self.n + 1)

    def is_anomalous(self, scores: np.ndarray) -> np.ndarray:
        """Returns which scores [m] are above (not equal to) the threshold, bool [m]; errors as ``p_values``."""
        return _valid_scores(scores, "image") > self.threshold

    def with_rate(self, false_alarm: float, confidence: float | None) -> Calibration:
        """Returns the same scores with another guarantee."""
        return replace(self, false_alarm=false_alarm, confidence=confidence)

    def raised(self) -> Calibration:
        """Returns a calibration for scores recomputed with different rounding: no image exceeds its own score.

        Each score is raised by 5e-4 of the interquartile range. The guarantee still holds, as no more images are
        anomalous.
        """
        return replace(self, scores=self.scores + 5e-4 * self.spread() + 1e-5 * np.abs(self.scores))

    def describe(self, explain: bool = False) -> str:
        """Returns the threshold and its guarantee as lines of plain text; ``explain`` adds all assumptions."""
        strict, at = self.with_rate(self.false_alarm, 0.95), self.threshold
        return describe_calibration(
            self.summary(),
            strict.summary(),
            tied=math.isinf(at) or int((self.scores == at).sum()) > 1,
            bound=self.bound(self.confidence or 0.95),
            explain=explain,
        )

    def summary(self) -> dict[str, Any]:
        """Returns the threshold, its guarantee and its origin as JSON types; an infinite threshold is None."""
        names = ("rank", "n", "expected_rate", "false_alarm", "confidence", "attainable", "min_samples")
        return {
            "threshold": finite(self.threshold),
            **{name: getattr(self, name) for name in names},
            "bound_95": self.bound(),
            **{name: getattr(self, name) for name in ("how", "folds", "created", "source")},
        }

    def to_json(self) -> dict[str, Any]:
        """Returns all fields except the scores, as JSON types; the scores are stored separately."""
        return {name: getattr(self, name) for name in CALIBRATION.required}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], scores: np.ndarray) -> Calibration:
        """Reads the output of ``to_json``, with the scores ``[n]`` in ascending order.

        Raises:
            CalibrationError: a field is missing, unknown or invalid, or the scores are not ascending.
        """
        try:
            CALIBRATION.check(data, "calibration")
        except SchemaError as error:
            raise CalibrationError(str(error)) from None
        scores = _valid_scores(scores, "calibration")
        if (scores[1:] < scores[:-1]).any():
            first = int(np.argmax(scores[1:] < scores[:-1])) + 1
            found = f"{scores[first]:g} after {scores[first - 1]:g} at index {first}"
            raise CalibrationError(f"scores must ascend; found {found}")
        return cls(scores, **data)


def _valid_scores(scores: Any, which: str) -> np.ndarray:
    """Returns scores as float64 [n]; raises a CalibrationError for NaN, -inf and other shapes."""
    try:
        return checked_scores(scores, which)
    except (ValueError, TypeError, OverflowError) as error:
        raise CalibrationError(str(error)) from None
