"""Choosing among fitted models, and combinations of them, on good images and synthetic defects.

Every image is scored by models that have not seen it. A model is judged by its image AUROC, averaged over the kinds of
defects, as scores are in ``fastmaf.inspection.selection.ranking``. To the best one, others are added as long as the sum
of the standardised scores is better beyond chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

import fastmaf
from fastmaf.images.reduce import reduced
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.combined import Combination, CombinedModel, combine
from fastmaf.inspection.interface import AnomalyModel, Candidate, HeldOut
from fastmaf.inspection.selection.drawn_auroc import kind_aurocs, resampled_means
from fastmaf.inspection.synthetic_defects.draw import SyntheticDefects

_STANDARD_ERRORS = 1.0
"""A combination must be better by this many standard errors of the difference, on the same resamples."""

_JOIN = " + "


class Choice(NamedTuple):
    """What a fit chose.

    Attributes:
        model: the candidate's model, or a ``CombinedModel``; with ``about`` extended by ``figures``.
        names: of the candidates that it consists of.
        held_out: its scores and maps of the sets that decided.
        figures: ``drawn_auroc_of_candidates``, the image AUROC of each candidate and combination that was compared;
            ``chosen``, the name of the one taken; ``drawn_gain``, the gain of the last combination tried over what it
            extends, and ``drawn_gain_error``, its standard error (None without a combination).
    """

    model: AnomalyModel
    names: tuple[str, ...]
    held_out: HeldOut
    figures: dict[str, Any]


@fastmaf.torch_defaults()
def choose_candidate(
    candidates: Sequence[Candidate],
    pixels: Tensor,
    drawn: Sequence[SyntheticDefects],
    *,
    first: str | None = None,
    preferred: str | None = None,
    false_alarm: float = 0.05,
) -> Choice:
    """Chooses the best of several candidates, or a combination of them, on synthetic defects.

    Args:
        candidates: fitted to ``reduced(pixels, candidate.size)``; of equal ones, the first is taken.
        pixels: the good images, uint8 ``[n, 3, s, s]``, at least of the largest candidate's size.
        drawn: the same images with a synthetic defect, once or more; see ``draw_defects``.
        first: name of a candidate that is taken in any case, and to which others are added; None: the best one.
        false_alarm: the rate that a combined model is calibrated at.
        preferred: name of the candidate that another one must beat beyond chance; None: the best is taken.

    Returns:
        The choice. Its model takes images of ``pixels``' size: a candidate of a smaller size alone is a
        ``CombinedModel`` of one part.

    Raises:
        ValueError: there is no candidate, two have the same name, or ``first`` is none of them.
    """
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"candidates: expected one or more, of different names; found {names}")
    if first is not None and first not in names:
        raise ValueError(f"first must be one of {names}; found {first!r}")
    size, kinds = int(pixels.shape[-1]), np.concatenate([defects.kinds for defects in drawn])
    sets = [pixels, *(defects.pixels for defects in drawn)]
    held: dict[str, HeldOut] = {}
    small: dict[int, list[Tensor]] = {}
    for candidate in candidates:
        if candidate.size not in small:
            small[candidate.size] = [reduced(images, candidate.size) for images in sets]
        held[candidate.name] = candidate.held_out(small[candidate.size])
    aurocs = {name: _auroc(result.scores, kinds) for name, result in held.items()}
    chosen = [first or max(names, key=lambda name: aurocs[name])]
    if preferred is not None and chosen != [preferred]:
        difference, error = _gain(held[chosen[0]].scores, held[preferred].scores, kinds)
        if not difference > _STANDARD_ERRORS * error:
            chosen = [preferred]
    gain: tuple[float, float] | None = None
    while len(chosen) < len(names):
        sums = {name: _sum([held[other].scores for other in (*chosen, name)]) for name in names if name not in chosen}
        found = {name: _auroc(scores, kinds) for name, scores in sums.items()}
        aurocs |= {_JOIN.join(_ordered(names, [*chosen, name])): auroc for name, auroc in found.items()}
        best = max(found, key=lambda name: found[name])
        gain = _gain(sums[best], _sum([held[other].scores for other in chosen]), kinds)
        if not gain[0] > _STANDARD_ERRORS * gain[1]:
            break
        chosen.append(best)
    chosen = _ordered(names, chosen)
    figures: dict[str, Any] = {
        "chosen": _JOIN.join(chosen),
        "drawn_auroc_of_candidates": aurocs,
        "drawn_gain": None if gain is None else gain[0],
        "drawn_gain_error": None if gain is None else gain[1],
    }
    models = [candidate.model() for candidate in candidates if candidate.name in chosen]
    if len(models) == 1 and models[0].size == size:
        models[0].about.update(figures)
        return Choice(models[0], tuple(chosen), held[chosen[0]], figures)
    combination = combine(chosen, [held[name] for name in chosen], size)
    model = combined_model(models, combination, size, false_alarm)
    model.about.update(figures)
    return Choice(model, tuple(chosen), combination.held_out, figures)


def combined_model(
    models: Sequence[AnomalyModel], combination: Combination, size: int, false_alarm: float
) -> CombinedModel:
    """Returns models as one, calibrated on its held-out scores of the good images."""
    scores, maps = combination.held_out
    first = models[0].calibration
    calibration = Calibration(scores[0], false_alarm, None, first.how, first.folds)
    about = {
        "images": len(scores[0]),
        "map_levels": [float(np.quantile(maps[0], 0.99)), float(maps[0].max())],
    }
    return CombinedModel(tuple(models), combination.standards, size, calibration, about)


def _ordered(names: Sequence[str], some: Sequence[str]) -> list[str]:
    return [name for name in names if name in some]


def _sum(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the sum of scores ``[sets, n]``, each standardised over the first set."""
    total: np.ndarray = sum((s - s[0].mean()) / (float(s[0].std()) or 1.0) for s in scores)  # type: ignore[assignment]
    return total


def _auroc(scores: np.ndarray, kinds: np.ndarray) -> float:
    return float(np.mean(list(kind_aurocs(scores[0], scores[1:].ravel(), kinds).values())))


def _gain(first: np.ndarray, second: np.ndarray, kinds: np.ndarray) -> tuple[float, float]:
    """Returns the difference of two scores' mean AUROCs, and its standard error by resampling the good images."""
    means = [resampled_means(scores[0], scores[1:].ravel(), kinds) for scores in (first, second)]
    return _auroc(first, kinds) - _auroc(second, kinds), float(np.std(means[0] - means[1]))
