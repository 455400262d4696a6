"""The image AUROC on synthetic defects, by kind, and its resamples."""

from __future__ import annotations

import numpy as np

from fastmaf.inspection.synthetic_defects.draw import KINDS
from fastmaf.metrics.auroc import auroc, auroc_of_counts


def kind_aurocs(normal: np.ndarray, defect: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """Returns the image AUROC of the defects of each kind that there are.

    Args:
        normal: scores of good images ``[n]``.
        defect: scores of these with a defect, in the same order, once or more ``[draws n]``.
        kinds: of each defect.
    """
    return {kind: _auroc(normal, defect[kinds == kind]) for kind in KINDS if (kinds == kind).any()}


def _auroc(normal: np.ndarray, defect: np.ndarray) -> float:
    return auroc(np.concatenate([normal, defect]), np.arange(len(normal) + len(defect)) >= len(normal))


def resampled_means(normal: np.ndarray, defect: np.ndarray, kinds: np.ndarray, resamples: int = 200) -> np.ndarray:
    """Returns the mean over kinds of ``kind_aurocs`` for resamples of good images together with their defects.

    The resamples are the same for every score.
    """
    rng = np.random.default_rng(0)
    n, draws = len(normal), len(defect) // len(normal)
    values, codes = np.unique(np.concatenate([normal, defect]), return_inverse=True)
    index = np.stack([rng.integers(0, n, n) for _ in range(resamples)])
    times = np.stack([np.bincount(row, minlength=n) for row in index])  # each image in each resample
    of_normals = _sums_by_code(times, codes[:n], len(values))
    areas = np.full((len(KINDS), resamples), np.nan)
    for area, kind in zip(areas, KINDS, strict=True):
        of_kind = np.tile(times, draws) * (kinds == kind)
        there = of_kind.any(axis=1)
        of_defects = _sums_by_code(of_kind[there], codes[n:], len(values))
        area[there] = auroc_of_counts(of_normals[there], of_defects)
    return np.nanmean(areas, axis=0)


def _sums_by_code(times: np.ndarray, codes: np.ndarray, size: int) -> np.ndarray:
    """Returns how often each code occurs in each resample ``[resamples, size]``."""
    counts = np.zeros((size, len(times)), dtype=times.dtype)
    np.add.at(counts, codes, times.T)
    return counts.T
