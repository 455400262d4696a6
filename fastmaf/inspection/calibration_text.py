"""A calibration in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmaf.inspection.calibration import Calibration

_ASSUMPTION = (
    "All of this assumes that new normals look like these; for another camera, light or material, recalibrate."
)
_K_FOLD = (
    "K-fold: the scores come from the models of the folds, the verdicts from a model fitted to all normals.",
    "Where leaving a fold out changes scores little, that model's rates are near those above, and usually below.",
    "No theorem says so; judging by the folds' models (cross-conformal) guarantees about twice the rate, {twice}.",
    "Recalibrating on normals that the final model has not seen guarantees the rate itself.",
)


def described(calibration: Calibration) -> str:
    """What was done, what may be expected and what it assumes: lines of plain text, a sentence or two each.

    References (of the caveat on k-fold):
        Barber, Candès, Ramdas and Tibshirani 2021, Predictive inference with the jackknife+: CV+ covers at about
        1 - 2 alpha, while no such guarantee is possible for thresholds from cross-validation without the "+", where a
        model fitted to everything judges; both are near 1 - alpha where fitting is stable.
        Vovk 2015, Cross-conformal predictors.
    """
    c = calibration
    lines = [_normals(c), _threshold(c), _rates(c), _promise(c)]
    if c.confidence is None:
        lines.append(_stronger(c))
    lines.append(_ASSUMPTION)
    if c.how == "k-fold":
        lines += [line.format(twice=_percent(min(1.0, 2 * c.false_alarm))) for line in _K_FOLD]
    return "\n".join(lines)


def _normals(c: Calibration) -> str:
    who = "all by one model" if c.folds is None else f"each by the model of the fold that left it out ({c.folds} folds)"
    origin = ", ".join(part for part in (c.source, c.created) if part)
    return f"Calibrated on {_count(c.n)}{f' ({origin})' if origin else ''}, scored {who}."


def _threshold(c: Calibration) -> str:
    if math.isinf(c.threshold):
        return (
            f"Threshold inf, score {c.rank} of {c.n} in ascending order: nothing is above it, so nothing is anomalous."
        )
    return f"Threshold {c.threshold:.6g}, score {c.rank} of {c.n} in ascending order: an image above it is anomalous."


def _rates(c: Calibration) -> str:
    tied = int((c.scores == c.threshold).sum()) > 1 or math.isinf(c.threshold)
    bounds = f"{_percent(c.bound())} with 95% confidence"
    if c.confidence not in (None, 0.95):
        bounds += f", {_percent(c.bound(c.confidence))} with {_percent(c.confidence)}"
    expected = f"{'at most ' if tied else ''}{_percent(c.expected_rate)}"
    return f"Expected false alarms: {expected} on average over calibration sets; for this one at most {bounds}."


def _promise(c: Calibration) -> str:
    scope = "on average" if c.confidence is None else f"for this set with {_percent(c.confidence)} confidence"
    asked = f"Promise asked for, at most {_percent(c.false_alarm)} {scope}:"
    if c.met:
        return f"{asked} met; it takes {_count(c.needed)}."
    return f"{asked} NOT met by the largest score; it takes {_count(c.needed)}, {c.needed - c.n:,} more."


def _stronger(c: Calibration) -> str:
    """What a user who wants the rate for this calibration set, rather than on average, can do."""
    other = c.with_rate(c.false_alarm, 0.95)
    wanted = f"For at most {_percent(c.false_alarm)} with 95% confidence choose --confidence 0.95"
    if other.met:
        return f"{wanted}: the threshold becomes {other.threshold:.6g} (possible from {_count(other.needed)} on)."
    return f"{wanted}, possible from {_count(other.needed)} on: {other.needed - c.n:,} more."


def _count(n: int) -> str:
    return f"{n:,} normal{'' if n == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
