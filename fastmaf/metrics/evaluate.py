"""Evaluation of image scores: AUROC, thresholds and their error rates.

A score is an image's NLL in nats; higher scores are more anomalous. The class "good" is normal, every other class a
defect. Scores are ranked in float64: NLLs near -4e4 that pass through a sigmoid or float32 become ties.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from fastmaf.io.wording import count, ordinal
from fastmaf.metrics.auroc import auroc, auroc_interval
from fastmaf.metrics.results import (
    NORMAL,
    ClassStats,
    Evaluation,
    EvaluationError,
    Prf,
    Roc,
    ThresholdReport,
    checked_scores,
    missing_kind,
)

_YOUDEN_HOW = "chosen on the test labels themselves (largest Youden's J), so these results are optimistic"


def evaluate_scores(
    nll: np.ndarray,
    labels: Sequence[str],
    *,
    held_out_nll: np.ndarray | None = None,
    false_alarm: float = 0.05,
    bootstrap: int = 2000,
    seed: int = 0,
    features: int | None = None,
) -> Evaluation:
    """Evaluates the scores of a labelled test set.

    Args:
        nll: NLLs of the test images, float64 [n], in nats. +inf is more anomalous than any number; NaN and -inf are
            errors.
        labels: n class names.
        held_out_nll: NLLs [m] of normals that are neither in the training set nor in the test set. They give a second
            threshold, by split conformal prediction, that does not depend on test labels.
        false_alarm: false-alarm rate (alpha) guaranteed by the held-out threshold, in (0, 1).
        bootstrap: number of resamples for the interval of the AUROC; 0 for no interval.
        seed: seed of the bootstrap.
        features: number of dimensions of an image, for bits/dim.

    Raises:
        EvaluationError: lengths differ, a score is NaN or -inf, normals or defects are missing, or an option is out of
            range.
    """
    scores = checked_scores(nll, "test", labels)
    if not 0 < false_alarm < 1:
        raise EvaluationError(f"false_alarm must lie strictly between 0 and 1, found {false_alarm!r}")
    if bootstrap < 0:
        raise EvaluationError(f"bootstrap must be 0 (no interval) or a number of resamples, found {bootstrap!r}")
    if features is not None and features < 1:
        raise EvaluationError(f"features must be the number of dimensions of an image, found {features!r}")
    classes = np.asarray([str(label) for label in labels])
    if message := missing_kind(classes.tolist()):
        raise EvaluationError(message)
    tally = Counter(classes.tolist())
    counts = {name: tally[name] for name in sorted(tally, key=lambda name: (name != NORMAL, name))}
    defect = classes != NORMAL

    values, codes = np.unique(scores, return_inverse=True)
    roc = _roc(values, codes, defect)
    # Point 0 of the ROC (nothing anomalous, J = 0) has no finite threshold and is skipped.
    best = 1 + int(np.argmax((roc.tpr - roc.fpr)[1:]))
    youden = _report("Youden", float(roc.thresholds[best]), True, _YOUDEN_HOW, scores, classes, counts)
    held_out = reason = None
    if held_out_nll is None:
        reason = "there are no held-out good images"
    elif np.size(held_out_nll) == 0:
        reason = "the set of held-out good images is empty"
    else:
        threshold, how, guaranteed, rate_95 = conformal_threshold(held_out_nll, false_alarm)
        held_out = _report("held-out", threshold, False, how, scores, classes, counts, guaranteed, rate_95)

    return Evaluation(
        counts=counts,
        auroc=auroc(scores, defect),
        auroc_interval=auroc_interval(scores, defect, bootstrap, seed) if bootstrap else None,
        bootstrap=bootstrap,
        per_class={name: _class_stats(name, scores, classes) for name in counts},
        roc=roc,
        youden=youden,
        held_out=held_out,
        held_out_reason=reason,
        features=features,
    )


def decimal(share: float) -> Fraction:
    """Returns the decimal number that a float stands for: in floats 100 * (1 - 0.07) exceeds 93."""
    return Fraction(str(float(share)))


def conformal_rank(n: int, false_alarm: float) -> tuple[int, int]:
    """Returns the rank ceil((n+1)(1-alpha)) among n scores, and the smallest n that has it: ceil(1/alpha) - 1."""
    alpha = decimal(false_alarm)
    return math.ceil((n + 1) * (1 - alpha)), math.ceil(1 / alpha) - 1


def conformal_threshold(held_out_nll: np.ndarray, false_alarm: float) -> tuple[float, str, float, float]:
    """Returns the split conformal threshold: the ceil((n+1)(1-alpha))-th smallest score of n held-out normals.

    An image is anomalous if its NLL exceeds the threshold. For exchangeable normals the false-alarm rate is at most
    alpha. Below n = 1/alpha - 1 that rank does not exist; the largest score is used, which guarantees 1/(n+1).

    Returns:
        The threshold in nats; a description of how it was chosen; the guaranteed rate, on average over held-out sets;
        and the rate that 95% of held-out sets of this size stay below (the Beta(n+1-k, k) quantile for rank k).

    References:
        Vovk et al., Algorithmic Learning in a Random World, 2005. Papadopoulos, Inductive Conformal Prediction, 2008.
    """
    from scipy.special import betaincinv

    scores = np.sort(checked_scores(held_out_nll, "held-out"))
    n = len(scores)
    rank, least = conformal_rank(n, false_alarm)
    if rank <= n:
        guaranteed = float(false_alarm)
        how = (
            f"the {ordinal(rank)} lowest NLL of {n:,} held-out good images, for a false-alarm rate of {guaranteed:g} "
            "(split conformal prediction); no label of the test set was used"
        )
    else:
        rank, guaranteed = n, 1 / (n + 1)
        how = (
            f"the highest NLL of {count(n, 'held-out good image')}: too few for a false-alarm rate of "
            f"{float(false_alarm):g}, which needs {least:,}; the guaranteed rate is 1/(n+1) = {guaranteed:.3g} "
            "(split conformal prediction); no label of the test set was used"
        )
    threshold = float(scores[rank - 1])
    if math.isinf(threshold):
        how += "; it is infinite, so no image is called anomalous"
    return threshold, how, guaranteed, float(betaincinv(n + 1 - rank, rank, 0.95))


def _roc(values: np.ndarray, codes: np.ndarray, defect: np.ndarray) -> Roc:
    """Returns the ROC over sorted distinct values, from their ranks, as scikit-learn refuses infinite scores."""
    from sklearn.metrics import roc_curve  # slow to import

    fpr, tpr, _ = roc_curve(defect, codes, drop_intermediate=False)
    return Roc(fpr, tpr, np.concatenate([[np.inf], values[::-1]]))


def _class_stats(name: str, scores: np.ndarray, classes: np.ndarray) -> ClassStats:
    nlls = scores[classes == name]
    area = None
    if name != NORMAL:
        pair = (classes == name) | (classes == NORMAL)
        area = auroc(scores[pair], classes[pair] != NORMAL)
    with np.errstate(invalid="ignore", over="ignore"):  # infinite scores: mean inf, std NaN
        return ClassStats(len(nlls), float(nlls.mean()), float(nlls.std()), float(np.median(nlls)), area)


def _report(
    name: str,
    threshold: float,
    inclusive: bool,
    how: str,
    scores: np.ndarray,
    classes: np.ndarray,
    counts: Mapping[str, int],
    guaranteed: float | None = None,
    rate_95: float | None = None,
) -> ThresholdReport:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # slow to import

    truth = classes != NORMAL
    called = scores >= threshold if inclusive else scores > threshold
    (tn, fp), (fn, tp) = confusion_matrix(truth, called, labels=[False, True]).tolist()
    table = np.transpose(precision_recall_fscore_support(truth, called, labels=[False, True], zero_division=0)[:3])
    return ThresholdReport(
        name=name,
        threshold=threshold,
        inclusive=inclusive,
        how=how,
        confusion=((tn, fp), (fn, tp)),
        accuracy=(tn + tp) / len(scores),
        normal=Prf(*table[0].tolist()),
        anomaly=Prf(*table[1].tolist()),
        alarms={label: int(called[classes == label].sum()) for label in counts},
        false_alarm_rate=fp / (tn + fp),
        baseline_accuracy=float(truth.mean()),
        promised_rate=guaranteed,
        rate_95=rate_95,
    )
