"""Selecting the augmentation of the whitening, by held-out likelihood."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.out_of_fold import drop_fold
from fastmaf.inspection.recipe import AUGMENTATIONS, Augmentation, Recipe
from fastmaf.inspection.scoring.float64_flow import FlowValues
from fastmaf.inspection.whitening import before_whitening, fit_whitening

_DECIDING_IMAGES = 8  # held-out images that the comparison uses at least, in as many folds as that takes


def select_augmentation(
    x: Tensor, folds: Sequence[np.ndarray], recipe: Recipe, done: Callable[[], object]
) -> tuple[Recipe, list[fastmaf.GaussianWhitening], dict[str, Any]]:
    """Compares augmentations, and none, on held-out images.

    Args:
        x: normal images ``[n, D]``, as their NLL is measured.
        folds: the indices of each fold. The first folds decide, as many as hold out 8 images.
        recipe: ``augmentation="auto"`` selects the best. Any other is compared with none, and kept.
        done: called after each whitening.

    Returns:
        The recipe with the selected augmentation; its whitenings without each of the first folds; and the mean NLLs in
        nats of the held-out images of these folds that decided, for the model's record.

    Warns:
        UserWarning: held-out images are more likely without the augmentation, or the logit, that the recipe asks for.
    """
    folds = folds[: _deciding_folds(recipe, len(x))]
    candidates = _candidates(recipe)
    tried = {kind: _held_out_nll(x, folds, replace(recipe, augmentation=kind), done) for kind in candidates}
    best = min(candidates, key=lambda kind: tried[kind][1])
    selected = best if recipe.augmentation == "auto" else recipe.augmentation
    whitenings, nll = tried[selected]
    if nll > tried[best][1]:
        _warn(f"augmentation={selected!r}", nll, tried[best][1], "augmentation='auto'")
    recipe, plain = replace(recipe, augmentation=selected), None
    if recipe.logit is not None:
        plain = _held_out_nll(x, folds, replace(recipe, logit=None), done)[1]
        if nll > plain:
            _warn(f"logit={recipe.logit:g}", nll, plain, "logit=None")
    compared = {str(kind): value for kind, (_, value) in tried.items()} if len(tried) > 1 else {}
    figures = {"held_out_nll_of_augmentations": compared, "held_out_nll_without_logit": plain}
    return recipe, whitenings, figures


def compared_whitenings(recipe: Recipe, n: int) -> int:
    """Returns how many whitenings of n images are fitted for the comparison alone."""
    return _deciding_folds(recipe, n) * (len(_candidates(recipe)) - 1 + (recipe.logit is not None))


def _deciding_folds(recipe: Recipe, n: int) -> int:
    return min(recipe.folds, math.ceil(_DECIDING_IMAGES * recipe.folds / n))


def _candidates(recipe: Recipe) -> tuple[Augmentation, ...]:
    return AUGMENTATIONS if recipe.augmentation == "auto" else tuple(dict.fromkeys((recipe.augmentation, "none")))


def _warn(part: str, nll: float, other: float, alternative: str) -> None:
    warnings.warn(
        f"{part} makes held-out images less likely (NLL {nll:,.0f} nats with it, {other:,.0f} without); it is kept as "
        f"requested, {alternative} drops it",
        stacklevel=5,
    )


def _held_out_nll(
    x: Tensor, folds: Sequence[np.ndarray], recipe: Recipe, done: Callable[[], object]
) -> tuple[list[fastmaf.GaussianWhitening], float]:
    """Returns the whitening without each fold, and the mean NLL of the held-out images of these folds."""
    first = before_whitening(recipe)
    y, whitenings, nll = fastmaf.Flow(recipe.features, first)(x)[0], [], []
    for fold in folds:
        whitenings.append(fit_whitening(drop_fold(y, fold), recipe))
        nll.append(FlowValues(fastmaf.Flow(recipe.features, [*first, whitenings[-1]]), x[fold]).nll)
        done()
    return whitenings, float(torch.cat(nll).mean())
