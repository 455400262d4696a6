"""Conformal calibration of anomaly scores from normal images alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fastmaf.inspection.calibration.description import describe
from fastmaf.inspection.calibration.threshold import CalibrationError, ConformalThreshold, valid_scores


@dataclass(frozen=True, eq=False)
class Calibration(ConformalThreshold):
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

    def describe(self) -> str:
        """Returns the threshold, its guarantee and its assumptions as lines of plain text."""
        return describe(self)

    def to_json(self) -> dict[str, Any]:
        """Returns all fields except the scores, as JSON types; the scores are stored separately."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "scores"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], scores: np.ndarray) -> Calibration:
        """Reads the output of ``to_json``, with the scores ``[n]`` in ascending order.

        Raises:
            CalibrationError: a field is missing, unknown or invalid, or the scores are not ascending.
        """
        if not isinstance(data, Mapping):
            raise CalibrationError(f"a calibration must be a mapping; found {type(data).__name__}")
        expected = {item.name for item in fields(cls)} - {"scores"}
        if set(data) != expected:
            names = ", ".join(sorted(map(str, data))) or "nothing"
            raise CalibrationError(f"a calibration must have the fields {', '.join(sorted(expected))}; found {names}")
        scores = valid_scores(scores, "calibration")
        if (scores[1:] < scores[:-1]).any():
            first = int(np.argmax(scores[1:] < scores[:-1])) + 1
            found = f"{scores[first]:g} after {scores[first - 1]:g} at index {first}"
            raise CalibrationError(f"scores must ascend; found {found}")
        return cls(scores, **data)
