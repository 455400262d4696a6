"""The Gaussian whitening of a recipe."""

from __future__ import annotations

from torch import Tensor

import fastmaf
from fastmaf.inspection.augmentation import rotations, shifts
from fastmaf.inspection.recipe import QUANTISATION, Recipe


def before_whitening(recipe: Recipe) -> list[fastmaf.Transform]:
    """Returns the transforms before the whitening: the recipe's logit, if any."""
    return [] if recipe.logit is None else [fastmaf.Logit(recipe.features, recipe.logit)]


def fit_whitening(x: Tensor, recipe: Recipe) -> fastmaf.GaussianWhitening:
    """Returns a whitening fitted to normal images ``[n, D]`` with the recipe's augmentation (shifts if ``"auto"``)."""
    if recipe.augmentation == "none":
        augment = None
    elif recipe.augmentation == "rotations":
        augment = rotations(recipe.size, recipe.angles)
    else:
        augment = shifts(recipe.size, recipe.shift_radius, recipe.shift_step)
    whitening = fastmaf.GaussianWhitening(recipe.features, min(recipe.rank, recipe.features))
    # A logit stretches the 8-bit quantisation steps by its slope, which is smallest in the middle.
    floor = QUANTISATION if recipe.logit is None else QUANTISATION * (4 * (1 - 2 * recipe.logit)) ** 2
    return whitening.fit_(x, augment=augment, folds=recipe.folds, floor=floor, seed=recipe.seed)
