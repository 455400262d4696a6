"""What an evaluation found, and how it is written down: JSON, CSV, a table for the terminal.

`fastmaf.metrics.evaluate` computes it and passes these names on; this half needs numpy alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NORMAL = "good"


def bits_per_dim(nll: float, features: int) -> float:
    """`nll` (nats) as bits per dimension of data in [0, 1]; add 8 for the nominal figure of 8-bit data."""
    return nll / (features * math.log(2))


class EvaluationError(ValueError):
    """Scores or labels that cannot be evaluated; the message says what was found."""


class Prf(NamedTuple):
    """Precision, recall and F1 of one of the two classes; 0 where a denominator is 0."""

    precision: float
    recall: float
    f1: float


class Roc(NamedTuple):
    """The ROC by falling threshold, one point per distinct score (float64 [k + 1] each).

    Point i calls an image anomalous iff nll >= thresholds[i]; point 0 is "nothing is anomalous", its threshold inf.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray


@dataclass(frozen=True)
class ClassStats:
    """The NLLs of one class in nats; `std` has divisor n, `auroc` is against "good" (None for "good" itself)."""

    n: int
    mean: float
    std: float
    median: float
    auroc: float | None


@dataclass(frozen=True)
class ThresholdReport:
    """One operating point: a threshold, where it came from, and what it does to the test images.

    Attributes:
        name: "Youden" or "held-out".
        threshold: in nats.
        inclusive: anomalous iff nll >= threshold (Youden, as in sklearn's roc_curve) rather than nll > threshold
            (held-out, as the conformal guarantee wants it).
        how: how the threshold was chosen, in words.
        confusion: ((TN, FP), (FN, TP)): rows are the truth, normal first.
        alarms: images called anomalous, by class.
        false_alarm_rate: FP / normals of the test set.
        baseline_accuracy: the accuracy of calling every image anomalous.
        promised_rate: held-out only: the false-alarm rate that the threshold promises on average over held-out sets.
        rate_95: held-out only: the false-alarm rate that 95% of held-out sets of this size stay below.
    """

    name: str
    threshold: float
    inclusive: bool
    how: str
    confusion: tuple[tuple[int, int], tuple[int, int]]
    accuracy: float
    normal: Prf
    anomaly: Prf
    alarms: Mapping[str, int]
    false_alarm_rate: float
    baseline_accuracy: float
    promised_rate: float | None = None
    rate_95: float | None = None

    def is_anomalous(self, nll: np.ndarray) -> np.ndarray:
        """Bool array of nll's shape: which scores (nats) this threshold calls anomalous."""
        nll = np.asarray(nll, dtype=np.float64)
        return nll >= self.threshold if self.inclusive else nll > self.threshold


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate_scores` found.

    Attributes:
        counts: images by class, "good" first.
        auroc: P(NLL of a defect > NLL of a normal) + half the ties.
        auroc_interval: 95% stratified percentile bootstrap; None when bootstrap = 0.
        per_class: statistics of each class, "good" first.
        youden: at the threshold chosen on the test labels.
        held_out: at the threshold from held-out normals; None when there were none, `held_out_reason` says why.
        features: dimensions of an image, for bits/dim; None when not given.
    """

    counts: Mapping[str, int]
    auroc: float
    auroc_interval: tuple[float, float] | None
    bootstrap: int
    per_class: Mapping[str, ClassStats]
    roc: Roc
    youden: ThresholdReport
    held_out: ThresholdReport | None
    held_out_reason: str | None
    features: int | None

    @property
    def n_normal(self) -> int:
        """Images of class "good"."""
        return self.counts[NORMAL]

    @property
    def n_anomalous(self) -> int:
        """Images of every other class."""
        return sum(self.counts.values()) - self.n_normal

    def bits_per_dim(self, nll: float) -> float | None:
        """`nll` (nats) as bits per dimension, nll / (features * ln 2); None without `features`."""
        return None if self.features is None else bits_per_dim(float(nll), self.features)


def nats(value: float, digits: int = 0) -> str:
    """A number of nats for people: thousands separated, decimals only where they matter, powers of ten when huge."""
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.{digits if abs(value) >= 1000 else max(digits, 2)}f}"


def checked_scores(nll: np.ndarray, which: str, labels: Sequence[str] | None = None) -> np.ndarray:
    """`nll` as float64 [n] without NaN or -inf, or an EvaluationError."""
    scores = np.asarray(nll, dtype=np.float64)
    if scores.ndim != 1:
        raise EvaluationError(f"the {which} scores must be one NLL per image, shape [n]; found {list(scores.shape)}")
    if labels is not None and len(labels) != len(scores):
        raise EvaluationError(f"each score needs its label; found {len(scores)} scores and {len(labels)} labels")
    for bad, name in ((np.isnan(scores), "NaN"), (np.isneginf(scores), "-inf")):
        if bad.any():
            where = f"the first at index {int(np.argmax(bad))}"
            if labels is not None:
                tally = Counter(str(label) for label, hit in zip(labels, bad, strict=True) if hit)
                where = ", ".join(f"{k} {v}" for k, v in sorted(tally.items())) + "; " + where
            raise EvaluationError(f"{int(bad.sum())} of {len(scores)} {which} scores are {name} ({where}): no ranking")
    return scores
