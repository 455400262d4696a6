"""The area under the ROC from ranks, exactly and in float64, and its bootstrap over images.

A score is one number an image, higher meaning more anomalous; infinities are allowed, NaN is not.
"""

from __future__ import annotations

import numpy as np


def auroc(nll: np.ndarray, defect: np.ndarray) -> float:
    """P(score of a defect > score of a normal) + P(equal) / 2, exactly, in float64.

    Args:
        nll: [n] scores; infinities allowed, NaN not.
        defect: bool [n], at least one of each.
    """
    values, codes = np.unique(np.asarray(nll, dtype=np.float64), return_inverse=True)
    normals, defects = (np.bincount(codes[group], minlength=len(values)) for group in (~defect, defect))
    return float(auroc_of_counts(normals, defects))


def auroc_of_counts(normals: np.ndarray, defects: np.ndarray) -> np.ndarray:
    """AUROC from how often each rank occurs, ranks ascending along the last axis: [..., ranks] twice -> [...]."""
    below = np.cumsum(normals, axis=-1) - normals / 2
    return (defects * below).sum(-1) / (normals.sum(-1) * defects.sum(-1))


def auroc_interval(scores: np.ndarray, defect: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of `auroc` by the bootstrap over images; scores [n], defect bool [n] with one of each."""
    low, high = np.quantile(bootstrap_auroc(np.asarray(scores)[None], defect, resamples, seed), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_auroc(scores: np.ndarray, defect: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The AUROCs [k, resamples] of k scores [k, n] of the same n images, all k on the same resamples.

    Normals and defects (bool [n], at least one of each) are resampled separately, so every resample has both.
    """
    rng = np.random.default_rng(seed)
    ranks = [np.unique(row, return_inverse=True)[1] for row in np.asarray(scores, dtype=np.float64)]
    groups = np.flatnonzero(~defect), np.flatnonzero(defect)
    chunk = max(1, 4_000_000 // len(defect))  # bounds the memory for large test sets
    sampled = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = [group[rng.integers(0, len(group), (rows, len(group)))] for group in groups]
        sampled.append([auroc_of_counts(*(_counts(codes, images) for images in drawn)) for codes in ranks])
    return np.concatenate(sampled, axis=1)


def _counts(codes: np.ndarray, images: np.ndarray) -> np.ndarray:
    """How often each code occurs among the images of each row: [n], [rows, m] -> [rows, codes]."""
    rows, size = len(images), int(codes.max()) + 1
    own = codes[images] + size * np.arange(rows)[:, None]
    return np.bincount(own.ravel(), minlength=rows * size).reshape(rows, size)
