"""Pixel metrics of anomaly maps: pixel AUROC and area under the per-region overlap (AU-PRO), both exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import label

from fastmaf.metrics.auroc import PairedDifference, auroc_of_counts, check_resamples
from fastmaf.metrics.pixel_ranks import PixelRanks
from fastmaf.metrics.results import EvaluationError

_FPR_LIMIT = 0.3


def pixel_auroc(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]) -> float:
    """P(a defect pixel's value > a defect-free one's) + P(equal) / 2, over the pixels of all images together.

    Args:
        maps: an anomaly map [s, t] per image, finite; resized to its mask's resolution by ``resize_map``.
        masks: bool [h, w] per image; None for an image without a defect, which is resized to the masks' most common
            shape. Leave out defective images whose mask is missing.

    Raises:
        EvaluationError: numbers or shapes do not match, a map is not finite, or all pixels are of one kind.
    """
    pixels = PixelRanks(maps, masks)
    return _pixel_auroc(pixels, pixels.total())


def compare_pixels(
    several: Sequence[Sequence[np.ndarray]],
    masks: Sequence[np.ndarray | None],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[list[float], list[PairedDifference]]:
    """Compares sets of maps of the same images by their pixel AUROC, over the same resamples of the images.

    Images with and without a defect pixel are resampled separately. Resamples without a defect-free pixel are left out.

    Args:
        several: sets of maps, each as ``maps`` of ``pixel_auroc``, in any unit.
        masks: as there.
        resamples, seed: as in ``paired_bootstrap``.

    Returns:
        The pixel AUROC of each set, and its difference to that of the first set.

    Raises:
        EvaluationError: as ``pixel_auroc``.
    """
    check_resamples(resamples)
    correct_pairs = []  # correctly ranked pairs of pixels for each pair of images: a resample only weights them
    for maps in several:
        pixels = PixelRanks(maps, masks)
        n = len(pixels.maps)
        correct, free = np.empty((n, n)), np.empty(n)
        for i, counts in enumerate(pixels.free()):
            below = (np.cumsum(counts) - counts / 2)[1::2]
            correct[i] = np.bincount(pixels.image, weights=below[pixels.codes], minlength=n)
            free[i] = counts.sum()
        correct_pairs.append(correct)
    defect = np.bincount(pixels.image, minlength=n)
    rng = np.random.default_rng(seed)
    times = np.zeros((1 + resamples, n))  # the first row: the images themselves
    times[0] = 1
    groups = [group for group in (np.flatnonzero(defect == 0), np.flatnonzero(defect)) if len(group)]
    for group in groups:
        times[1:, group] = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), resamples)
    pairs = (times @ free) * (times @ defect)
    usable = pairs > 0
    areas = [((times @ correct) * times).sum(axis=1)[usable] / pairs[usable] for correct in correct_pairs]
    fewest = min(map(len, groups))
    return [float(area[0]) for area in areas], [PairedDifference.of(area, areas[0], fewest) for area in areas]


def au_pro(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None], fpr_limit: float = _FPR_LIMIT) -> float:
    """Area under the per-region overlap, divided by the limit: 1 is perfect, chance is about fpr_limit / 2.

        PRO(t) = mean over regions of the share of the region with map >= t
        FPR(t) = share of all defect-free pixels with map >= t

    Regions are the connected components of the masks, including diagonal neighbours. PRO is linear between the points
    of the thresholds, and at the limit.

    Args:
        maps: as in ``pixel_auroc``.
        masks: as in ``pixel_auroc``.
        fpr_limit: PRO is integrated over FPR from 0 to this limit, in (0, 1].

    Raises:
        EvaluationError: as ``pixel_auroc``, or the limit is out of range.

    References:
        Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 129, 2021, section 5.
    """
    if not 0 < fpr_limit <= 1:
        raise EvaluationError(f"fpr_limit must lie in (0, 1]; found {fpr_limit}")
    pixels = PixelRanks(maps, masks)
    return _au_pro(pixels, pixels.total(), fpr_limit)


def pixel_auroc_and_au_pro(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]) -> tuple[float, float]:
    """Returns ``pixel_auroc`` and ``au_pro``, whose pixels are ranked once; arguments and errors as there."""
    pixels = PixelRanks(maps, masks)
    total = pixels.total()
    return _pixel_auroc(pixels, total), _au_pro(pixels, total, _FPR_LIMIT)


def _pixel_auroc(pixels: PixelRanks, total: np.ndarray) -> float:
    return float(auroc_of_counts(total, pixels.spread(np.ones(len(pixels.codes)))))


def _au_pro(pixels: PixelRanks, total: np.ndarray, fpr_limit: float) -> float:
    shares = []
    for mask in pixels.masks:
        if mask is not None:
            region = label(mask, np.ones((3, 3)))[0][mask]
            shares.append(1 / np.bincount(region)[region])
    weights = np.concatenate(shares)
    total = total[::-1]
    fpr = np.append(0, np.cumsum(total)) / total.sum()
    pro = np.append(0.0, np.cumsum(pixels.spread(weights)[::-1])) / weights.sum()
    # Slots between two values change FPR only, those of a value change both at once: exactly the polyline.
    end = int(np.searchsorted(fpr, fpr_limit))
    part = (fpr_limit - fpr[end - 1]) / (fpr[end] - fpr[end - 1])
    fpr = np.append(fpr[:end], fpr_limit)
    pro = np.append(pro[:end], pro[end - 1] + part * (pro[end] - pro[end - 1]))
    return float((np.diff(fpr) * (pro[1:] + pro[:-1])).sum() / 2 / fpr_limit)
