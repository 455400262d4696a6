"""A calibration in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastmaf.io.wording import count, ordinal, percent

_IN_SHORT = "the assumptions behind these rates: --explain, or describe(explain=True) in Python"
_EXPLAINED = (
    '"On average" is over calibration sets: other images of the same kind would give another threshold and rate.',
    "The rate with 95% confidence is one that 95 of 100 such sets stay below.",
    "Assumption: new good images come from the same process as the calibration images (they are exchangeable).",
    "After a change of camera, light or material: fastmaf inspect recalibrate MODEL NEW_GOOD_IMAGES",
)
_K_FOLD = (
    "The calibration scores come from models that were each fitted without one fold of the images.",
    "The verdicts come from one model that was fitted to all images.",
    "If leaving out a fold changes scores little, that model's rates are close to those above, and usually lower.",
    "That is not proven. Proven is about twice the rate, {twice}, and only for verdicts by the models of the folds.",
    "Recalibrating on good images that the model has not seen makes the guarantee hold without this reservation.",
)


def describe_calibration(
    figures: Mapping[str, Any], strict: Mapping[str, Any], *, tied: bool, bound: float, explain: bool
) -> str:
    """Returns the threshold and its guarantee as lines of plain text.

    Args:
        figures: ``Calibration.summary()``.
        strict: the same at 95% confidence.
        tied: whether scores equal to the threshold make the expected rate an upper bound.
        bound: the upper bound on the rate at the requested confidence; not used without one.
        explain: add the origin of the scores and all assumptions.

    References (for the caveat on k-fold):
        Barber, Candès, Ramdas and Tibshirani 2021, Predictive inference with the jackknife+: CV+ covers at about
        1 - 2 alpha, while no such guarantee is possible for thresholds from cross-validation without the "+",
        where the verdicts come from a model fitted to all data; both are near 1 - alpha if fitting is stable.
        Vovk 2015, Cross-conformal predictors.
    """
    confidence, available = figures["confidence"], f"{figures['n']:,} available"
    at_most = f"at most {percent(figures['false_alarm'])}"
    scope = "on average" if confidence is None else f"with {percent(confidence)} confidence"
    bounds = f"at most {percent(figures['bound_95'])} for this calibration set, with 95% confidence"
    if confidence not in (None, 0.95):
        bounds += f" ({percent(bound)} with {percent(confidence)})"
    expected = f"{'at most ' if tied else ''}{percent(figures['expected_rate'])}"
    lines = [_threshold(figures), f"expected false alarms: {expected} on average; {bounds}"]
    needs = f"needs {count(figures['min_samples'], 'calibration image')}, {available}"
    if not figures["attainable"]:
        refused = f"{at_most} false alarms {scope} cannot be guaranteed (this {needs})"
        lines.append(f"{refused}; the highest score is the threshold instead")
    elif explain or confidence is not None:
        lines.append(f"guarantee: {at_most} false alarms {scope} ({needs})")
    if confidence is None and (explain or figures["attainable"]):
        needs = f"needs {count(strict['min_samples'], 'calibration image')}, {available}"
        if strict["attainable"]:
            needs = f"threshold {_number(strict['threshold'])}; {needs}"
        lines.append(f"for {at_most} with 95% confidence, calibrate with --confidence 0.95 ({needs})")
    if not explain:
        return "\n".join([*lines, _IN_SHORT])
    origin = ", ".join(part for part in (figures["source"], figures["created"]) if part)
    scorer = "scored by one model that was not fitted to them"
    if figures["folds"] is not None:
        scorer = f"each scored by a model fitted without its fold ({figures['folds']} folds)"
    images = f"{count(figures['n'], 'good image')}{f' ({origin})' if origin else ''}"
    lines += [f"The threshold was calibrated on {images}, {scorer}.", *_EXPLAINED]
    if figures["folds"] is not None:
        twice = percent(min(1.0, 2 * figures["false_alarm"]))
        lines += [line.format(twice=twice) for line in _K_FOLD]
    return "\n".join(lines)


def _threshold(figures: Mapping[str, Any]) -> str:
    n, rank, threshold = figures["n"], figures["rank"], _number(figures["threshold"])
    scores = f"{n:,} {'calibration' if figures['folds'] is None else 'held-out'} scores"
    if n == 1:
        subject = f"the score of the only calibration image, {threshold}, is the threshold"
    else:
        place = "highest" if rank == n else "lowest" if rank == 1 else f"{ordinal(rank)} lowest"
        subject = f"the {place} of the {scores}, {threshold}, is the threshold"
    if figures["threshold"] is None:
        return f"{subject}; no score is above it, so nothing is called anomalous"
    return f"{subject}; images above it are called anomalous"


def _number(threshold: float | None) -> str:
    """Formats a threshold; None is an infinite one."""
    return f"{math.inf if threshold is None else threshold:.6g}"
