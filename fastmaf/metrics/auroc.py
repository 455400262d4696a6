"""The area under the ROC curve, computed exactly from ranks in float64, its interval, and paired differences.

Each image has one score; higher scores are more anomalous. Infinities are allowed, NaN is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from fastmaf.metrics.intervals import auroc_score_interval, difference_interval, small_sample_factor
from fastmaf.metrics.results import EvaluationError, checked_scores


@dataclass(frozen=True)
class PairedDifference:
    """The AUROC of one score, or of the pixels of its maps, minus that of another, over the same images.

    Attributes:
        difference: on the images themselves.
        low, high: its 95% interval.
        not_better: share of the resamples in which the first AUROC is not above the second.
        resamples: number of resamples.
    """

    difference: float
    low: float
    high: float
    not_better: float
    resamples: int

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray, images: int) -> PairedDifference:
        """Returns the difference of AUROCs ``[1 + m]``: of the images, then of the same ``m`` resamples of them.

        The percentile interval is widened by ``small_sample_factor``.

        Args:
            first, second: the AUROCs.
            images: number of images that were resampled; of good or defective images, the smaller.
        """
        difference, *resampled = first - second
        low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
        factor = small_sample_factor(images)
        if math.isfinite(factor):
            low = max(min(low, difference + (low - difference) * factor), -1.0)
            high = min(max(high, difference + (high - difference) * factor), 1.0)
        else:
            low, high = -1.0, 1.0
        not_better = np.mean(np.asarray(resampled) <= 0)
        return cls(float(difference), float(low), float(high), float(not_better), len(resampled))


def auroc(nll: np.ndarray, defect: np.ndarray) -> float:
    """Returns the area under the ROC curve: P(score of a defect > score of a normal) + P(equal) / 2.

    Args:
        nll: scores [n], ranked in float64.
        defect: which images are defects, bool [n], at least one of each kind.
    """
    values, codes = np.unique(np.asarray(nll, dtype=np.float64), return_inverse=True)
    normals, defects = (np.bincount(codes[group], minlength=len(values)) for group in (~defect, defect))
    return float(auroc_of_counts(normals, defects))


def auroc_of_counts(normals: np.ndarray, defects: np.ndarray) -> np.ndarray:
    """Returns AUROCs [...] from counts of each rank, [..., ranks] in ascending order."""
    below = np.cumsum(normals, axis=-1) - normals / 2
    return (defects * below).sum(-1) / (normals.sum(-1) * defects.sum(-1))


def auroc_interval(scores: np.ndarray, defect: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Returns a 95% interval of ``auroc``: both its bootstrap interval over images and its score interval lie in it.

    The bootstrap follows the distribution of the scores, but has no width where all images are ranked correctly; the
    score interval (``auroc_score_interval``) has, but assumes a distribution. Together they held the true value in at
    least 91% of simulations with 4 to 23 good and 4 to 109 defective images, and in 98% on average.
    """
    area, defect = auroc(scores, defect), np.asarray(defect, dtype=bool)
    if (np.asarray(scores) == scores[0]).all():  # a constant has an AUROC of 1/2 on any images
        return area, area
    low, high = np.quantile(_bootstrap(np.asarray(scores)[None], defect, resamples, seed), [0.025, 0.975])
    least, most = auroc_score_interval(area, int((~defect).sum()), int(defect.sum()))
    return min(float(low), least), max(float(high), most)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, defect: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> PairedDifference:
    """Compares two scores of the same images by the bootstrap over images, normals and defects resampled separately.

    The interval also holds that of ``difference_interval``, with the score intervals of both AUROCs and the correlation
    of their resamples (0 where one of them does not vary). It has no width if both scores rank all images alike.

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
        raise EvaluationError(f"an AUROC needs good and defective images; found {(~defect).sum()} and {defect.sum()}")
    check_resamples(resamples)
    areas = np.array([[auroc(scores, defect)] for scores in pair])
    resampled = _bootstrap(np.stack(pair), defect, resamples, seed)
    normals, defects = int((~defect).sum()), int(defect.sum())
    several = np.hstack([areas, resampled])
    result = PairedDifference.of(several[0], several[1], min(normals, defects))
    ranks = [np.unique(scores, return_inverse=True)[1] for scores in pair]
    if np.array_equal(ranks[0], ranks[1]):
        return replace(result, low=0.0, high=0.0)
    first, second = areas[:, 0].tolist()
    varies = resampled.std(axis=1).min() > 0
    correlation = max(float(np.corrcoef(resampled)[0, 1]), 0.0) if varies else 0.0
    ends = [auroc_score_interval(area, normals, defects) for area in (first, second)]
    low, high = difference_interval(first, second, ends[0], ends[1], correlation)
    return replace(result, low=min(result.low, low), high=max(result.high, high))


def check_resamples(resamples: int) -> None:
    """Raises an EvaluationError for fewer than one resample."""
    if resamples < 1:
        raise EvaluationError(f"resamples must be at least 1; found {resamples}")


def _bootstrap(scores: np.ndarray, defect: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Returns AUROCs [k, resamples] of k scores [k, n] of the same n images, over the same resamples.

    Normals and defects are resampled separately, so every resample has both.
    """
    rng = np.random.default_rng(seed)
    ranks = [np.unique(row, return_inverse=True)[1] for row in np.asarray(scores, dtype=np.float64)]
    groups = np.flatnonzero(~defect), np.flatnonzero(defect)
    chunk = max(1, 4_000_000 // len(defect))  # bounds memory
    sampled = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = [group[rng.integers(0, len(group), (rows, len(group)))] for group in groups]
        sampled.append([auroc_of_counts(*(_counts(codes, images) for images in drawn)) for codes in ranks])
    return np.concatenate(sampled, axis=1)


def _counts(codes: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Counts each code [n] among the images [rows, m] of each row: [rows, codes]."""
    rows, size = len(images), int(codes.max()) + 1
    offset_codes = codes[images] + size * np.arange(rows)[:, None]
    return np.bincount(offset_codes.ravel(), minlength=rows * size).reshape(rows, size)
