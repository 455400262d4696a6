"""Fitting a model of pixels and one of features to good images, and choosing one of them or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

import fastmaf
from fastmaf.images.reduce import reduced
from fastmaf.inspection.features.candidate import FeatureCandidate, fit_features
from fastmaf.inspection.features.extractor import Extractor
from fastmaf.inspection.fit import Fitted, fit
from fastmaf.inspection.free_threads import free_threads
from fastmaf.inspection.pixel_candidate import PixelCandidate
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.selection.candidates import Choice, choose_candidate
from fastmaf.inspection.synthetic_defects.draw import draw_defects


class FittedBoth(NamedTuple):
    """What was chosen, and the models of pixels and of features behind it."""

    choice: Choice
    pixels: Fitted
    features: FeatureCandidate


@fastmaf.torch_defaults()
@free_threads()
def fit_with_features(
    pixels: Tensor,
    recipe: Recipe,
    extractor: Extractor,
    *,
    groups: Sequence[str] | None = None,
    progress: bool = True,
) -> FittedBoth:
    """Fits a model of pixels and one of features, and takes the better one on synthetic defects, or their sum.

    Args:
        pixels: good images, uint8 ``[n, 3, s, s]`` with s the size of the extractor; they are reduced for the pixels.
        recipe: of the model of pixels, at most of size s.
        extractor: from images to features.
        groups: as of ``fastmaf.inspection.fit.fit``.
        progress: show progress bars.

    Raises:
        ValueError: as ``fit`` and ``fit_features``, or the recipe's size is above s.
    """
    if recipe.size > extractor.size:
        raise ValueError(f"size must be at most that of the features, {extractor.size}; found {recipe.size}")
    double = reduced(pixels, 2 * recipe.size) if 2 * recipe.size <= extractor.size else None
    fitted = fit(reduced(pixels, recipe.size), recipe, double=double, groups=groups, progress=progress)
    drawn = [draw_defects(pixels, seed=recipe.seed)]
    features = fit_features(pixels, extractor, drawn=drawn, groups=groups, seed=recipe.seed, progress=progress)
    return FittedBoth(choose_candidate([PixelCandidate(fitted), features], pixels, drawn), fitted, features)
