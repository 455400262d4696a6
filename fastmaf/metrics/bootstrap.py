"""Comparing two scores of the same images by the paired bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmaf.metrics.auroc import auroc, bootstrap_auroc
from fastmaf.metrics.results import EvaluationError, checked_scores


@dataclass(frozen=True)
class PairedDifference:
    """The AUROC of one score, or of the pixels of its maps, minus that of another, over the same images.

    Attributes:
        difference: on the images themselves.
        low, high: its 95% percentile interval.
        not_better: share of the resamples in which the first AUROC is not above the second.
        resamples: number of resamples.
    """

    difference: float
    low: float
    high: float
    not_better: float
    resamples: int

    @classmethod
    def of(cls, first: float, second: float, resampled: tuple[np.ndarray, np.ndarray]) -> PairedDifference:
        """Returns the difference of two AUROCs with the interval from those of the same resamples, each ``[m]``."""
        apart = resampled[0] - resampled[1]
        low, high = np.quantile(apart, [0.025, 0.975])
        return cls(float(first - second), float(low), float(high), float((apart <= 0).mean()), len(apart))


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, defect: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> PairedDifference:
    """Compares two scores of the same images by the bootstrap over images, normals and defects resampled separately.

    Args:
        a: [n] scores, higher is more anomalous.
        b: [n] scores to compare them with, in any unit.
        defect: bool [n], at least one of each.
        resamples: at least 1.
        seed: of the resamples, which are the same for both scores.

    Raises:
        EvaluationError: lengths differ, a score is NaN or -inf, or there is no normal or no defective image.
    """
    defect = np.asarray(defect, dtype=bool)
    pair = checked_scores(a, "first"), checked_scores(b, "second")
    for scores, which in zip(pair, ("first", "second"), strict=True):
        if defect.shape != scores.shape:
            raise EvaluationError(
                f"each score needs its label; found {len(scores)} {which} scores and {defect.size} labels"
            )
    if not defect.any() or defect.all():
        raise EvaluationError(f"an AUROC needs normals and defects; found {(~defect).sum()} and {defect.sum()}")
    check_resamples(resamples)
    first, second = bootstrap_auroc(np.stack(pair), defect, resamples, seed)
    return PairedDifference.of(auroc(pair[0], defect), auroc(pair[1], defect), (first, second))


def check_resamples(resamples: int) -> None:
    """Raises an EvaluationError for fewer than one resample."""
    if resamples < 1:
        raise EvaluationError(f"resamples must be at least 1; found {resamples}")
