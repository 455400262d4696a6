"""Whether images are exchangeable: the assumption behind every false-alarm rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import bdtrc
from torch import Tensor

import fastmaf
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.out_of_fold import k_fold
from fastmaf.inspection.scoring.float64_flow import FlowValues
from fastmaf.io.wording import count, percent

_FEWEST = 20  # images that a test needs
_SIGNIFICANT = 1e-3
_RANK = 50
_RATE = 0.05


def drift(calibration: Calibration, scores: np.ndarray) -> str | None:
    """Returns a warning if scores are higher than good images like those of the calibration would give, else None.

    A one-sided two-sample Kolmogorov-Smirnov test of the scores and those of the calibration, which is one of the
    p-values against the uniform distribution. Lower scores do not count: those of a final model are lower than those of
    the fold models.

    Args:
        calibration: of the model.
        scores: float64 ``[n]``; of fewer than 20 images there is no test.
    """
    n = len(scores)
    if n < _FEWEST or calibration.n < _FEWEST:
        return None
    levels = np.sort(np.concatenate([scores, calibration.scores]))
    shares = [np.searchsorted(np.sort(x), levels, side="right") / len(x) for x in (scores, calibration.scores)]
    statistic = float((shares[1] - shares[0]).max())
    if 2 * statistic**2 * n * calibration.n / (n + calibration.n) < -math.log(10 * _SIGNIFICANT):
        return None  # p > 0.01, by the limit for many images, without the import that takes a tenth of a run
    from scipy.stats import ks_2samp

    p_value = float(ks_2samp(scores, calibration.scores, alternative="less").pvalue)
    if not p_value < _SIGNIFICANT:
        return None
    above = int(calibration.is_anomalous(scores).sum())
    return (
        f"these images do not look like the calibration images (Kolmogorov-Smirnov test of their scores: p = "
        f"{p_value:.1g}): {above:,} of {count(n, 'image')} above the threshold, {calibration.expected_rate * n:.0f} "
        "expected of good ones. If these are good, the false-alarm rate does not hold: fastmaf inspect recalibrate"
    )


@torch.no_grad()
def order_matters(x: Tensor, folds: int, seed: int) -> str | None:
    """Returns a warning if images are predicted better by models that have seen their neighbours in order, else None.

    Compares the NLL of held-out images for random and for contiguous folds, under Gaussians of at most 50 factors
    without augmentation: at a threshold for 5% of the former, more than 10% of the latter are above it, beyond chance
    (binomial tail below 0.001). Images in series (a position, a part, a day) are not exchangeable: random folds put
    neighbours into training and test set, and the false-alarm rate of images of another series is higher than they
    show.

    Args:
        x: good images ``[n, D]`` in the order of their names.
        folds: K.
        seed: of the random folds.
    """
    if len(x) < _FEWEST:
        return None
    shuffled, ordered = k_fold(len(x), folds, seed), np.array_split(np.arange(len(x)), folds)
    random, contiguous = (_held_out_nll(x, parts) for parts in (shuffled, ordered))
    calibration = Calibration(random.numpy(), _RATE, None, "k-fold", folds)
    above = int(calibration.is_anomalous(contiguous.numpy()).sum())
    if above <= 2 * _RATE * len(x) or bdtrc(above - 1, len(x), _RATE) >= _SIGNIFICANT:
        return None
    return (
        f"neighbouring images are alike: held out in blocks of neighbours, {percent(above / len(x))} of them are above "
        f"a threshold for {percent(_RATE)} of images held out at random (of their NLL). If they come in series (part, "
        "position, day), a new series will have more false alarms than stated: name the series with --group-by, or "
        "groups= in Python"
    )


def describe_groups(labels: Sequence[str], scores: np.ndarray, calibration: Calibration) -> str:
    """Returns what a calibration held out by groups guarantees, and the range of its groups' false-alarm rates.

    Args:
        labels: group of each image.
        scores: held-out score of each image.
        calibration: of these scores.
    """
    names, of_image = np.unique(np.asarray(labels), return_inverse=True)
    above = calibration.is_anomalous(scores).astype(float)
    rates = np.bincount(of_image, weights=above) / np.bincount(of_image)
    needed = Calibration(np.zeros(1), calibration.false_alarm, None, "split").min_samples
    available = f"{len(names):,} available"
    text = (
        f"held out by {count(len(names), 'group')}: false alarms from {percent(rates.min())} to {percent(rates.max())}"
    )
    if len(names) < needed:
        return (
            f"{text} of a group; at most {percent(calibration.false_alarm)} cannot be guaranteed for new groups "
            f"(this needs {needed} groups, {available})"
        )
    return (
        f"{text} of a group; the rate is on average over new groups like these ({available}, at least {needed} needed)"
    )


def _held_out_nll(x: Tensor, parts: Sequence[np.ndarray]) -> Tensor:
    """Returns the NLL of each image under the model without its part, float64 ``[n]`` nats."""
    whitenings, _ = fastmaf.GaussianWhitening.fit_without(x, _RANK, [torch.from_numpy(part) for part in parts])
    nll = torch.empty(len(x), dtype=torch.float64)
    for part, whitening in zip(parts, whitenings, strict=True):
        nll[part] = FlowValues(fastmaf.Flow(x.shape[1], [whitening]), x[part]).nll
    return nll
