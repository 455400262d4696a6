"""How well images and pixels are ranked: areas under curves over a labelled test set, exact, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import label

from fastmaf.inspection.pixels import PixelRanks, resize_map
from fastmaf.metrics.auroc import auroc, auroc_interval, auroc_of_counts, bootstrap_auroc
from fastmaf.metrics.results import NORMAL, EvaluationError, checked_scores

__all__ = [
    "PairedDifference",
    "au_pro",
    "auroc",
    "auroc_interval",
    "class_auroc",
    "compare_pixels",
    "paired_bootstrap",
    "pixel_auroc",
    "pixel_auroc_interval",
    "resize_map",
]


@dataclass(frozen=True)
class PairedDifference:
    """The AUROC of one score, or of the pixels of its maps, minus that of another, over the same images.

    Attributes:
        difference: on the images themselves.
        low, high: 95% percentile interval of it.
        not_better: share of the resamples in which the first one's AUROC is not above the second's.
        resamples: how many there were.
    """

    difference: float
    low: float
    high: float
    not_better: float
    resamples: int


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
        EvaluationError: lengths differ, a score is NaN or -inf, or there is no normal or no defect.
    """
    defect = np.asarray(defect, dtype=bool)
    scores = np.stack([_checked(one, which, defect) for one, which in ((a, "first"), (b, "second"))])
    if resamples < 1:
        raise EvaluationError(f"resamples must be at least 1; found {resamples}")
    first, second = bootstrap_auroc(scores, defect, resamples, seed)
    low, high = np.quantile(first - second, [0.025, 0.975])
    difference = auroc(scores[0], defect) - auroc(scores[1], defect)
    return PairedDifference(difference, float(low), float(high), float((first <= second).mean()), resamples)


def class_auroc(scores: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Returns the image AUROC of each defect class, by name, against all images of class "good"."""
    classes = np.asarray([str(name) for name in labels])
    scores = _checked(scores, "test", classes != NORMAL)
    pairs = {name: (classes == name) | (classes == NORMAL) for name in sorted({*classes.tolist()} - {NORMAL})}
    return {name: auroc(scores[pair], classes[pair] != NORMAL) for name, pair in pairs.items()}


def pixel_auroc(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]) -> float:
    """P(a defect pixel's value > a defect-free one's) + P(equal) / 2, over the pixels of all images together.

    Args:
        maps: an anomaly map [s, t] an image, finite, brought to its mask's resolution by ``resize_map``.
        masks: bool [h, w] an image; None for an image without any defect, which takes part at the masks' most common
            shape. Leave out defective images whose mask is missing.

    Raises:
        EvaluationError: numbers or shapes do not fit, a map is not finite, or one of the two kinds of pixels is absent.
    """
    pixels = PixelRanks(maps, masks)
    return float(auroc_of_counts(pixels.total(), pixels.spread(np.ones(len(pixels.codes)))))


def pixel_auroc_interval(
    maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of ``pixel_auroc`` by the bootstrap over images.

    Images with and without a defect pixel are resampled separately. The pairs of pixels that are ranked rightly are
    counted once for each pair of images; a resample only weights these counts, so it is as exact as the area itself.
    """
    low, high = np.quantile(_resampled([maps], masks, resamples, seed)[0, 1:], [0.025, 0.975])
    return float(low), float(high)


def compare_pixels(
    several: Sequence[Sequence[np.ndarray]],
    masks: Sequence[np.ndarray | None],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[list[float], list[PairedDifference]]:
    """Compares sets of maps of the same images by their pixel AUROC, over the same resamples of the images.

    Args:
        several: sets of maps, each as ``maps`` of ``pixel_auroc``, in any unit.
        masks: as there.
        resamples, seed: as in ``paired_bootstrap``.

    Returns:
        The pixel AUROC of each set, and each one's difference to the first; the first one's own is nothing.

    Raises:
        EvaluationError: as ``pixel_auroc``.
    """
    areas = _resampled(several, masks, resamples, seed)
    differences = []
    for own in areas:
        apart = own[1:] - areas[0, 1:]
        low, high = np.quantile(apart, [0.025, 0.975])
        found = float(own[0] - areas[0, 0]), float(low), float(high), float((apart <= 0).mean())
        differences.append(PairedDifference(*found, len(apart)))
    return areas[:, 0].tolist(), differences


def _resampled(
    several: Sequence[Sequence[np.ndarray]], masks: Sequence[np.ndarray | None], resamples: int, seed: int
) -> np.ndarray:
    """Returns the pixel AUROC of sets of maps ``[sets, 1 + resamples]``: of the images themselves, then of the same
    resamples for all sets, but for those in which no pixel is free of defects.
    """
    if resamples < 1:
        raise EvaluationError(f"resamples must be at least 1; found {resamples}")
    rights = []
    for maps in several:
        pixels = PixelRanks(maps, masks)
        n = len(pixels.maps)
        right, free = np.empty((n, n)), np.empty(n)
        for i, counts in enumerate(pixels.free()):
            below = (np.cumsum(counts) - counts / 2)[1::2]
            right[i] = np.bincount(pixels.image, weights=below[pixels.codes], minlength=n)
            free[i] = counts.sum()
        rights.append(right)
    broken = np.bincount(pixels.image, minlength=n)
    rng = np.random.default_rng(seed)
    times = np.zeros((1 + resamples, n))
    times[0] = 1
    for group in (np.flatnonzero(broken == 0), np.flatnonzero(broken)):
        if len(group):
            times[1:, group] = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), resamples)
    pairs = (times @ free) * (times @ broken)
    usable = pairs > 0  # not where all images drawn are defect through and through
    return np.stack([((times @ right) * times).sum(axis=1)[usable] / pairs[usable] for right in rights])


def au_pro(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None], fpr_limit: float = 0.3) -> float:
    """Area under the per-region overlap, divided by the limit: 1 is perfect, chance is about fpr_limit / 2.

        PRO(t) = mean over regions of the share of the region with map >= t
        FPR(t) = share of all defect-free pixels with map >= t

    Regions are the connected components of the masks, pixels that touch at a corner being connected. PRO is linear
    between the thresholds' points, and at the limit.

    Args:
        maps, masks: as in ``pixel_auroc``.
        fpr_limit: PRO is integrated over FPR from 0 to here, in (0, 1].

    Raises:
        EvaluationError: as ``pixel_auroc``, or the limit is out of range.

    References:
        Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 129, 2021, section 5.
    """
    if not 0 < fpr_limit <= 1:
        raise EvaluationError(f"fpr_limit must lie in (0, 1]; found {fpr_limit}")
    pixels = PixelRanks(maps, masks)
    shares = []
    for mask in pixels.masks:
        if mask is not None:
            region = label(mask, np.ones((3, 3)))[0][mask]
            shares.append(1 / np.bincount(region)[region])
    weights = np.concatenate(shares)
    total = pixels.total()[::-1]
    fpr = np.append(0, np.cumsum(total)) / total.sum()
    pro = np.append(0.0, np.cumsum(pixels.spread(weights)[::-1])) / weights.sum()
    # The slots between two values move FPR alone, those of a value move both at once: just the polyline.
    end = int(np.searchsorted(fpr, fpr_limit))
    part = (fpr_limit - fpr[end - 1]) / (fpr[end] - fpr[end - 1])
    fpr = np.append(fpr[:end], fpr_limit)
    pro = np.append(pro[:end], pro[end - 1] + part * (pro[end] - pro[end - 1]))
    return float((np.diff(fpr) * (pro[1:] + pro[:-1])).sum() / 2 / fpr_limit)


def _checked(scores: np.ndarray, which: str, defect: np.ndarray) -> np.ndarray:
    scores = checked_scores(scores, which)
    if defect.shape != scores.shape:
        raise EvaluationError(
            f"each score needs its label; found {len(scores)} {which} scores and {defect.size} labels"
        )
    if not defect.any() or defect.all():
        raise EvaluationError(f"an AUROC needs normals and defects; found {(~defect).sum()} and {defect.sum()}")
    return scores
