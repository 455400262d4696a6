"""Conclusions from a report's numbers: verdicts, the worst cases, and comparisons in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastmaf.inspection.evaluate import TableRow
from fastmaf.inspection.report.content import TestResults
from fastmaf.inspection.report.text import interval, number
from fastmaf.metrics.results import NORMAL, ThresholdReport


def worst_cases(scores: np.ndarray, labels: Sequence[str], threshold: float, k: int) -> tuple[np.ndarray, ...]:
    """Selects the images of a ``Gallery``: their positions, int64 [at most k] each, the most relevant first.

    They are the good images with the highest scores above the threshold, the defects with the lowest scores not above
    it, and the defects with the highest scores above it.

    Args:
        scores: float64 [n] anomaly scores.
        labels: n class names, "good" is normal.
        threshold: an image is anomalous iff its score is above it.
        k: largest number of each.
    """
    falling, rising = np.argsort(-scores, kind="stable"), np.argsort(scores, kind="stable")
    good, alarm = np.array([label == NORMAL for label in labels], dtype=bool), scores > threshold
    return (
        falling[(good & alarm)[falling]][:k],
        rising[(~good & ~alarm)[rising]][:k],
        falling[(~good & alarm)[falling]][:k],
    )


def alarms_by_class(labels: Sequence[str], anomalous: np.ndarray) -> dict[str, tuple[int, int]]:
    """Returns (images, images classified as anomalous) of each class, "good" first."""
    classes = np.asarray(labels)
    ordered = sorted(set(labels), key=lambda label: (label != NORMAL, label))
    return {label: (int((classes == label).sum()), int(anomalous[classes == label].sum())) for label in ordered}


class Verdicts(NamedTuple):
    """False alarms among the good images, and detections among the defective ones."""

    false_alarms: int
    good: int
    detected: int
    defective: int

    @classmethod
    def of(cls, report: ThresholdReport) -> Verdicts:
        """Returns the verdicts at a threshold of an evaluation."""
        (tn, fp), (fn, tp) = report.confusion
        return cls(fp, tn + fp, tp, fn + tp)

    def describe(self) -> str:
        """Returns both counts as text."""
        return f"{self.detected} of {self.defective} defects, false alarms: {self.false_alarms} of {self.good}"


def verdicts(test: TestResults, threshold: float) -> Verdicts:
    """Counts alarms."""
    good, alarm = np.asarray(test.labels) == NORMAL, test.scores > threshold
    return Verdicts(int((good & alarm).sum()), int(good.sum()), int((~good & alarm).sum()), int((~good).sum()))


def winning_baselines(table: Sequence[TableRow]) -> tuple[str, ...]:
    """Returns sentences on the baselines that beat the default score, or one that states that none does."""
    (default,), baselines = [row for row in table if row.default], [row for row in table if row.kind == "baseline"]
    if not baselines:
        return ("No baseline was evaluated, so the benefit of the model is not shown.",)
    none = "No baseline beats" if len(baselines) > 1 else f"The baseline {baselines[0].name} does not beat"
    return better(table, "baseline") or (f"{none} the default score ({default.name}).",)


def better(table: Sequence[TableRow], kind: str) -> tuple[str, ...]:
    """Returns a sentence on every metric in which a "score" or "baseline" (``kind``) beats the default score."""
    (default,) = [row for row in table if row.default]
    sentences = []
    for row in table:
        for metric, theirs, ours, difference in (
            ("image AUROC", row.auroc, default.auroc, row.difference),
            ("pixel AUROC", row.pixel_auroc, default.pixel_auroc, row.pixel_difference),
            ("AU-PRO", row.au_pro, default.au_pro, None),
        ):
            if row.kind != kind or theirs is None or ours is None or not theirs > ours:
                continue
            digits = 3 if number(theirs) != number(ours) else 5
            text = f"The {kind} {row.name} has the higher {metric}: {number(theirs, digits)} against "
            text += f"{number(ours, digits)} for the default score ({default.name})"
            if difference is not None:
                low, high = difference.low, difference.high
                clear = "includes 0: not significant on these images" if low <= 0 <= high else "excludes 0"
                text += f"; the paired 95% interval of the difference, {interval((low, high), 3, True)}, {clear}"
            sentences.append(text + ".")
    return tuple(sentences)
