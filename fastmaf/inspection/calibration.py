"""Conformal calibration of anomaly scores from normal images alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import betainc, betaincinv

from fastmaf.inspection.scoring.settings import check_fields
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

_ASSUMPTION = (
    "Assumption: new normal images come from the same process as these. Recalibrate after a change of camera, light or "
    "material."
)
_K_FOLD = (
    "K-fold: the scores come from the models of the folds, the verdicts from a model fitted to all images.\n"
    "If leaving out a fold changes scores little, that model's rates are close to those above, and usually lower.\n"
    "This is not a theorem: using the folds' models (cross-conformal) guarantees about twice the rate, {twice}.\n"
    "Recalibrating on normal images that the final model has not seen guarantees the rate itself."
)


class CalibrationError(ValueError):
    """Invalid calibration data or scores; the message states what was expected and what was found."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of normal images and the threshold taken from them; an image is anomalous iff its score is above it.

    With n scores s_(1) <= ... <= s_(n), the threshold is s_(k). For normal images exchangeable with these, the
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
            raise CalibrationError("a calibration needs the scores of normal images; found none")
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

    def describe(self) -> str:
        """Returns the threshold, its guarantee and its assumptions as lines of plain text.

        References (for the caveat on k-fold):
            Barber, Candès, Ramdas and Tibshirani 2021, Predictive inference with the jackknife+: CV+ covers at about
            1 - 2 alpha, while no such guarantee is possible for thresholds from cross-validation without the "+",
            where the verdicts come from a model fitted to all data; both are near 1 - alpha if fitting is stable.
            Vovk 2015, Cross-conformal predictors.
        """
        rate = _percent(self.false_alarm)
        origin = ", ".join(part for part in (self.source, self.created) if part)
        images = f"{self.n:,} normal image{'s' * (self.n != 1)}{f' ({origin})' if origin else ''}"
        scorer = "all scored by one model"
        if self.folds is not None:
            scorer = f"each scored by the model of the fold that left it out ({self.folds} folds)"
        threshold, meaning = f"{self.threshold:.6g}", "images with a higher score are anomalous"
        if math.isinf(self.threshold):
            meaning = "no score is above it, so nothing is anomalous"
        tied = (self.scores == self.threshold).sum() > 1 or math.isinf(self.threshold)
        expected = f"{'at most ' if tied else ''}{_percent(self.expected_rate)}"
        bounds, scope = f"{_percent(self.bound())} with 95% confidence", "on average"
        if self.confidence is not None:
            scope = f"for this calibration set with {_percent(self.confidence)} confidence"
            if self.confidence != 0.95:
                bounds += f", {_percent(self.bound(self.confidence))} with {_percent(self.confidence)}"
        guarantee = f"at most {rate} false alarms {scope} (needs {_needed(self)}; {self.n:,} available)."
        lines = [
            f"Calibrated on {images}, {scorer}.",
            f"Threshold {threshold}, score {self.rank} of {self.n} in ascending order: {meaning}.",
            f"Expected false alarms: {expected} on average over calibration sets; for this one at most {bounds}.",
            f"Guarantee: {guarantee}"
            if self.attainable
            else f"Guarantee NOT attainable: {guarantee} The largest score is the threshold.",
        ]
        if self.confidence is None:
            strict = self.with_rate(self.false_alarm, 0.95)
            cost = f", which needs {_needed(strict)}: {strict.min_samples - self.n:,} more."
            if strict.attainable:
                cost = f": the threshold becomes {strict.threshold:.6g} (needs {_needed(strict)})."
            lines.append(f"For at most {rate} with 95% confidence use --confidence 0.95{cost}")
        lines.append(_ASSUMPTION)
        if self.how == "k-fold":
            lines.append(_K_FOLD.format(twice=_percent(min(1.0, 2 * self.false_alarm))))
        return "\n".join(lines)

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


def _needed(calibration: Calibration) -> str:
    return f"{calibration.min_samples:,} calibration image{'s' * (calibration.min_samples != 1)}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
