"""Results of an evaluation: classes of values, and checks of the scores that they are computed from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NORMAL = "good"


def bits_per_dim(nll: float, features: int) -> float:
    """Converts an NLL in nats to bits per dimension of data in [0, 1]; 8-bit data have 8 more."""
    return nll / (features * math.log(2))


class EvaluationError(ValueError):
    """Scores or labels cannot be evaluated."""


class Prf(NamedTuple):
    """Precision, recall and F1 of normals or anomalies; 0 where a denominator is 0."""

    precision: float
    recall: float
    f1: float


class Roc(NamedTuple):
    """The ROC curve by decreasing threshold, one point per distinct score (float64 [k + 1] each).

    At point i an image is anomalous iff nll >= thresholds[i]; at point 0, with threshold inf, no image is.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray


@dataclass(frozen=True)
class ClassStats:
    """NLLs of one class in nats; ``std`` has divisor n, ``auroc`` is against "good" (None for "good" itself)."""

    n: int
    mean: float
    std: float
    median: float
    auroc: float | None


@dataclass(frozen=True)
class ThresholdReport:
    """One operating point: a threshold, how it was chosen, and its results on the test images.

    Attributes:
        name: "Youden" or "held-out".
        threshold: threshold in nats.
        inclusive: an image is anomalous iff nll >= threshold (Youden, as in scikit-learn's ``roc_curve``) rather than
            nll > threshold (held-out, as the conformal guarantee requires).
        how: description of how the threshold was chosen.
        confusion: ((TN, FP), (FN, TP)): rows are the true classes, normal first.
        alarms: number of images called anomalous, by class.
        false_alarm_rate: FP / normals of the test set.
        baseline_accuracy: accuracy of calling every image anomalous.
        promised_rate: held-out only: the guaranteed false-alarm rate, on average over held-out sets.
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
        """Returns which NLLs (nats) are anomalous at this threshold, as a bool array."""
        nll = np.asarray(nll, dtype=np.float64)
        return nll >= self.threshold if self.inclusive else nll > self.threshold


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of ``evaluate_scores``.

    Attributes:
        counts: number of images by class, "good" first.
        auroc: area under the ROC curve, ties counted half.
        auroc_interval: 95% interval, as of ``fastmaf.metrics.auroc.auroc_interval``; None if ``bootstrap`` is 0.
        per_class: statistics of each class, "good" first.
        youden: results at the threshold chosen on the test labels.
        held_out: results at the threshold from held-out normals; None without them, for ``held_out_reason``.
        features: number of dimensions of an image, for bits/dim; None if not given.
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
        """Converts an NLL in nats to bits per dimension; None without ``features``."""
        return None if self.features is None else bits_per_dim(float(nll), self.features)


def nats(value: float, digits: int = 0) -> str:
    """Formats a number of nats, with thousands separators and few digits."""
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.{digits if abs(value) >= 1000 else max(digits, 2)}f}"


def missing_kind(labels: Sequence[str]) -> str | None:
    """Returns an error message if normals or defects are missing among the labels, else None."""
    counts = Counter(labels)
    if counts[NORMAL] and len(counts) > 1:
        return None
    listing = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()) if n)
    return (
        f'expected good images (class "{NORMAL}") and defective ones (other classes); found no '
        f"{'defective' if counts[NORMAL] else 'good'} ones{f' ({listing})' if listing else ''}"
    )


def checked_scores(nll: np.ndarray, which: str, labels: Sequence[str] | None = None) -> np.ndarray:
    """Returns scores as float64 [n]; raises EvaluationError for other shapes, NaN and -inf."""
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
