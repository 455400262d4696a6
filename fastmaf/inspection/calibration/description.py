"""A calibration described in words."""

from __future__ import annotations

import math

from fastmaf.inspection.calibration.threshold import ConformalThreshold

_ASSUMPTION = (
    "Assumption: new normal images come from the same process as these. Recalibrate after a change of camera, light or "
    "material."
)
_K_FOLD = (
    "K-fold: the scores come from the models of the folds, the verdicts from a model fitted to all images.",
    "If leaving out a fold changes scores little, that model's rates are close to those above, and usually lower.",
    "This is not a theorem: using the folds' models (cross-conformal) guarantees about twice the rate, {twice}.",
    "Recalibrating on normal images that the final model has not seen guarantees the rate itself.",
)


def describe(c: ConformalThreshold) -> str:
    """Returns the threshold, its guarantee and its assumptions as lines of plain text.

    References (for the caveat on k-fold):
        Barber, Candès, Ramdas and Tibshirani 2021, Predictive inference with the jackknife+: CV+ covers at about
        1 - 2 alpha, while no such guarantee is possible for thresholds from cross-validation without the "+", where
        the verdicts come from a model fitted to all data; both are near 1 - alpha if fitting is stable.
        Vovk 2015, Cross-conformal predictors.
    """
    lines = [_images(c), _threshold(c), _rates(c), _guarantee(c)]
    if c.confidence is None:
        lines.append(_stronger_guarantee(c))
    lines.append(_ASSUMPTION)
    if c.how == "k-fold":
        lines += [line.format(twice=_percent(min(1.0, 2 * c.false_alarm))) for line in _K_FOLD]
    return "\n".join(lines)


def _images(c: ConformalThreshold) -> str:
    origin = ", ".join(part for part in (c.source, c.created) if part)
    images = f"{c.n:,} normal image{'' if c.n == 1 else 's'}{f' ({origin})' if origin else ''}"
    if c.folds is None:
        return f"Calibrated on {images}, all scored by one model."
    return f"Calibrated on {images}, each scored by the model of the fold that left it out ({c.folds} folds)."


def _threshold(c: ConformalThreshold) -> str:
    rank = f"score {c.rank} of {c.n} in ascending order"
    if math.isinf(c.threshold):
        return f"Threshold inf, {rank}: no score is above it, so nothing is anomalous."
    return f"Threshold {c.threshold:.6g}, {rank}: images with a higher score are anomalous."


def _rates(c: ConformalThreshold) -> str:
    tied = int((c.scores == c.threshold).sum()) > 1 or math.isinf(c.threshold)
    bounds = f"{_percent(c.bound())} with 95% confidence"
    if c.confidence not in (None, 0.95):
        bounds += f", {_percent(c.bound(c.confidence))} with {_percent(c.confidence)}"
    expected = f"{'at most ' if tied else ''}{_percent(c.expected_rate)}"
    return f"Expected false alarms: {expected} on average over calibration sets; for this one at most {bounds}."


def _guarantee(c: ConformalThreshold) -> str:
    scope = (
        "on average" if c.confidence is None else f"for this calibration set with {_percent(c.confidence)} confidence"
    )
    guarantee = (
        f"at most {_percent(c.false_alarm)} false alarms {scope} (needs {_count(c.min_samples)}; {c.n:,} available)"
    )
    if c.attainable:
        return f"Guarantee: {guarantee}."
    return f"Guarantee NOT attainable: {guarantee}. The largest score is the threshold."


def _stronger_guarantee(c: ConformalThreshold) -> str:
    """How to guarantee the rate for this calibration set, instead of on average."""
    other = c.with_rate(c.false_alarm, 0.95)
    text = f"For at most {_percent(c.false_alarm)} with 95% confidence use --confidence 0.95"
    if other.attainable:
        return f"{text}: the threshold becomes {other.threshold:.6g} (needs {_count(other.min_samples)})."
    return f"{text}, which needs {_count(other.min_samples)}: {other.min_samples - c.n:,} more."


def _count(n: int) -> str:
    return f"{n:,} calibration image{'' if n == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
