"""How a ``Detector`` fits to images: which models of which sizes, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from fastmaf.inspection.aspect import aspect_of, usable_side
from fastmaf.inspection.detector_input import pixels_for_sizes, square_pixels
from fastmaf.inspection.features.extractor import extractor_of
from fastmaf.inspection.features.fit import fit_with_features
from fastmaf.inspection.fit import fit
from fastmaf.inspection.framing import framing_of
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.kinds import COMPARED, Kind, fit_texture_model, plausible_kind, texture_size
from fastmaf.inspection.model import Shapes
from fastmaf.inspection.posed import in_one_pose
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.sizes import fit_sizes, sides_for, sizes_for
from fastmaf.inspection.texture.candidate import TextureCandidate
from fastmaf.inspection.tiled_fit import fit_tiles
from fastmaf.inspection.tiles import tiled_size


class ImageFit(NamedTuple):
    """Arguments of a ``Detector`` that decide which models are fitted; see there.

    Attributes:
        choose_size: whether ``size`` is ``"auto"``.
        tiles: along each side.
        kind: of the models.
        features: what computes them, or None.
        budget: in seconds, of the choice among sizes.
        verbose: show progress.
    """

    choose_size: bool
    tiles: int
    kind: Kind
    features: nn.Module | str | None
    budget: float
    verbose: bool


def fit_images(
    X: Any, groups: Sequence[str] | None, recipe: Recipe, wanted: ImageFit, warn_of_few: Callable[[int, str], None]
) -> tuple[AnomalyModel, np.ndarray]:
    """Returns the model of images and the held-out score of each.

    Args:
        X: images as a ``Detector`` takes them.
        groups: of the images, or None.
        recipe: the settings, of the first size.
        wanted: which models.
        warn_of_few: called with the number of samples or groups, and their name, before the work.

    Raises:
        ValueError: X or an argument is invalid.
        DataError: an image file cannot be read.
    """
    extractor = None if wanted.features is None else extractor_of(wanted.features)
    if extractor is not None and wanted.tiles > 1:
        raise ValueError(f"features are of whole images: expected tiles=1; found {wanted.tiles}")
    if wanted.tiles > 1 and wanted.kind != "object":
        raise ValueError(
            f"tiles are of objects: expected kind='object' with tiles={wanted.tiles}; found {wanted.kind!r}"
        )
    double: Tensor | None
    if extractor is not None:
        samples, double, shapes = square_pixels(X, extractor.size)
        sizes = sizes_for(min(extractor.size, usable_side(shapes)), wanted.budget)
    elif wanted.choose_size:
        if wanted.tiles > 1:
            raise ValueError(f"size='auto' is of whole images: expected tiles=1; found {wanted.tiles}")
        sizes, samples, double, shapes = pixels_for_sizes(X, recipe, wanted.budget)
    else:
        samples, double, shapes = square_pixels(X, tiled_size(recipe.size, wanted.tiles), double=True)
    if not wanted.choose_size:
        sizes = (recipe.size,)
    whole = wanted.kind != "texture" and wanted.tiles == 1
    framing = framing_of(samples, shapes, recipe, is_object=wanted.kind == "object") if whole else None
    recipe = replace(recipe, aspect=aspect_of(shapes) if framing is None else framing.box.aspect)
    side = tiled_size(replace(recipe, size=sizes[-1]).side, wanted.tiles)
    of_side = samples.shape[-1] == side or (extractor is not None and samples.shape[-1] > side)
    if wanted.kind != "texture" and len(samples) and not of_side:
        samples, double, _ = square_pixels(X, side, double=double is not None)
    if framing is not None:
        samples, double = framing.laid(samples, shapes), None if double is None else framing.laid(double, shapes)
    n = len(samples)
    if n < 3:
        raise ValueError(f"X must hold at least 3 good images; found {n}")
    warn_of_few(*((n, "samples") if groups is None else (len(set(groups)), "groups")))
    recipe = replace(recipe, size=sizes[0], folds=min(recipe.folds, n))
    options: Any = {"groups": groups, "progress": wanted.verbose}
    model: AnomalyModel
    kind = wanted.kind if framing is None else "object"
    posed = in_one_pose(samples, double, recipe) if whole else None
    if posed is not None:
        kind, samples, double = "object", posed.pixels, posed.double
    elif kind == "auto":
        kind = plausible_kind(samples)[0]
    if extractor is not None:
        texture: TextureCandidate | None = None
        if kind != "object":
            samples, _, _ = square_pixels(X, max(texture_size(shapes, COMPARED), samples.shape[-1]))
            texture = fit_texture_model(samples, recipe, shapes=shapes, **options).candidate
        options |= {"budget": wanted.budget, "texture": texture}
        chosen = fit_with_features(samples, sizes, recipe, extractor, **options)
        model, scores = chosen.model, chosen.held_out.scores[0]
    elif wanted.tiles > 1:
        model, scores = fit_tiles(samples, recipe, wanted.tiles, double=double, **options)
    elif kind != "object":
        budget = wanted.budget if kind == "auto" else None
        model, scores = _fit_texture(X, shapes, recipe, sizes, double, budget, **options)
    elif len(sizes) > 1:
        chosen = fit_sizes(samples, sizes, recipe, double=double, budget=wanted.budget, **options)
        model, scores = chosen.model, chosen.held_out.scores[0]
    else:
        fitted = fit(samples, recipe, double=double, **options)
        model, scores = fitted.model, fitted.held_out.scores[0]
    if wanted.choose_size:
        model.about["configuration"] = {"size": "auto", "budget": wanted.budget}
    model = model if posed is None else posed.model(model)
    return model if framing is None else framing.model(model), scores


def _fit_texture(
    X: Any,
    shapes: Shapes,
    recipe: Recipe,
    sizes: tuple[int, ...],
    double: Tensor | None,
    budget: float | None,
    **options: Any,
) -> tuple[AnomalyModel, np.ndarray]:
    """Returns a texture model, or with a budget of both kinds what is better on synthetic defects; held-out scores."""
    compared = max(texture_size(shapes, COMPARED), *sides_for(sizes, recipe))
    side = texture_size(shapes) if budget is None else compared
    large, _, _ = square_pixels(X, side)
    texture = fit_texture_model(large, recipe, shapes=shapes, **options)
    if budget is None:
        return texture.model, texture.held_out.scores[0]
    options |= {"budget": budget, "others": [texture.candidate]}
    chosen = fit_sizes(large, sizes, recipe, double=double if sides_for(sizes, recipe)[-1] == side else None, **options)
    return chosen.model, chosen.held_out.scores[0]
