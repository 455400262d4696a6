"""Fitting models of pixels beside one of features, and choosing whether both are used."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fastmaf
from fastmaf.images.reduce import reduced
from fastmaf.inspection.exchangeability import describe_groups
from fastmaf.inspection.features.candidate import fit_features
from fastmaf.inspection.features.extractor import Extractor
from fastmaf.inspection.fit_stages import Stages
from fastmaf.inspection.free_threads import free_threads
from fastmaf.inspection.interface import Candidate
from fastmaf.inspection.out_of_fold import some_of
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.selection.candidates import choose_candidate
from fastmaf.inspection.sizes import BUDGET, IMAGES, FittedSizes, fit_each, model_of_all, sides_for
from fastmaf.inspection.synthetic_defects.draw import draw_defects
from fastmaf.inspection.texture.candidate import TextureCandidate
from fastmaf.training.callbacks import Callback


@fastmaf.torch_defaults()
@free_threads()
def fit_with_features(
    pixels: Tensor,
    sizes: Sequence[int],
    recipe: Recipe,
    extractor: Extractor,
    *,
    groups: Sequence[str] | None = None,
    every_fold: bool = False,
    callbacks: Sequence[Callback] = (),
    stages: Stages | None = None,
    budget: float = BUDGET,
    texture: TextureCandidate | None = None,
    progress: bool = True,
) -> FittedSizes:
    """Fits models of pixels and one of features, which is used in any case.

    A model of pixels is added if the sum of the standardised scores is better on synthetic defects. Whether the
    features are worth their time is not decided on these: they are changes of pixels, at which a density of pixels is
    best, while features also tell what such defects do not show, such as another shape or print.

    Args:
        pixels: good images, uint8 ``[n, 3, s, s]`` with s at least the size of the extractor, the sides of the
            models of pixels, and that of the texture; they are reduced for the others.
        sizes: of the models of pixels, ascending.
        recipe: of these models, except ``size``.
        extractor: from images to features.
        groups, every_fold, callbacks, stages: as of ``fastmaf.inspection.fit.fit``.
        budget: as of ``fastmaf.inspection.sizes.fit_sizes``.
        texture: a texture model of the same images, which is added likewise.
        progress: show progress bars.

    Raises:
        ValueError: as ``fit`` and ``fit_features``, or a size is above s.
    """
    if max(sizes) > extractor.size:
        raise ValueError(f"size must be at most that of the features, {extractor.size}; found {max(sizes)}")
    side = max(extractor.size, *sides_for(sizes, recipe))
    options: Any = {"groups": groups, "every_fold": every_fold, "callbacks": callbacks, "stages": stages}
    options |= {"budget": budget, "progress": progress}
    of_pixels, seconds = fit_each(reduced(pixels, side), sizes, recipe, double=None, **options)
    begun = time.perf_counter()
    index = some_of(len(pixels), IMAGES, recipe.seed)
    compared = pixels if len(index) == len(pixels) else pixels[torch.from_numpy(index)]
    drawn = [draw_defects(compared, seed=recipe.seed)]
    given: Any = {"groups": groups, "seed": recipe.seed, "progress": progress}
    small = [defects._replace(pixels=reduced(defects.pixels, extractor.size)) for defects in drawn]
    features = fit_features(reduced(pixels, extractor.size), extractor, drawn=small, index=index, **given)
    seconds[features.name] = time.perf_counter() - begun
    begun = time.perf_counter()
    some: list[Candidate] = [
        *(candidate.subset(IMAGES, recipe.seed)[1] for candidate in of_pixels),
        features.subset(index, reduced(compared, extractor.size)),
        *([] if texture is None else [texture.subset(IMAGES, recipe.seed)[1]]),
    ]
    choice = choose_candidate(some, compared, drawn, first=features.name)
    every: list[Candidate] = [*of_pixels, features, *([] if texture is None else [texture])]
    model, held_out = model_of_all(choice, every, pixels, len(index))
    if groups is not None:
        model.about["groups"] = describe_groups(groups, held_out.scores[0], model.calibration)
    seconds["choice"] = time.perf_counter() - begun
    skipped = tuple(sizes[len(of_pixels) :])
    model.about["skipped_sizes"] = list(skipped)
    return FittedSizes(model, tuple(of_pixels), skipped, seconds, held_out)
