"""The Gaussian whitening of a recipe, fitted to good images and to shifts or rotations of them.

The augmentation is selected by held-out likelihood.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.augmentation import Augment, matching_blur, rotations, shifts
from fastmaf.inspection.out_of_fold import joined_folds, k_fold
from fastmaf.inspection.recipe import AUGMENTATIONS, QUANTISATION, Augmentation, Recipe
from fastmaf.inspection.scoring.float64_flow import FlowValues

__all__ = [
    "Augment",
    "Normals",
    "Whitenings",
    "before_whitening",
    "fit_whitening",
    "fit_whitenings",
    "rotations",
    "select_augmentation",
    "shifts",
]

_COMPARED = 128  # images that augmentations are first compared on
_COMPARED_RANK = 200
_COMPARED_FOLDS = 2  # of four: half of these images are held out once
_CLEAR = 0.02  # nats a dimension that an augmentation must be expected to gain on all images, not to be compared there


class Normals(NamedTuple):
    """The good images of a fit.

    Attributes:
        x: as their NLL is measured ``[n, D]``.
        double: the same images at twice the size, uint8 ``[n, C, 2 h, 2 w]``, for the augmentation; None to
            interpolate ``x`` instead.
    """

    x: Tensor
    double: Tensor | None = None

    def subset(self, index: Tensor) -> Normals:
        """Returns some of the images."""
        return Normals(self.x[index], None if self.double is None else self.double[index])


class Whitenings(NamedTuple):
    """The whitening without the images of each fold, and that of all images."""

    folds: list[fastmaf.GaussianWhitening]
    whole: fastmaf.GaussianWhitening


def before_whitening(recipe: Recipe) -> list[fastmaf.Transform]:
    """Returns the transforms before the whitening: the recipe's logit, if any."""
    return [] if recipe.logit is None else [fastmaf.Logit(recipe.features, recipe.logit)]


def fit_whitening(x: Tensor, recipe: Recipe, double: Tensor | None = None) -> fastmaf.GaussianWhitening:
    """Returns a whitening fitted to good images ``[n, D]`` with the recipe's augmentation (shifts if ``"auto"``)."""
    folds = k_fold(len(x), min(recipe.folds, len(x)), recipe.seed)
    return fit_whitenings(Normals(x, double), folds, recipe).whole


def fit_whitenings(normals: Normals, folds: Sequence[np.ndarray], recipe: Recipe) -> Whitenings:
    """Returns whitenings fitted to good images with the recipe's augmentation (shifts if ``"auto"``)."""
    first = before_whitening(recipe)
    before = fastmaf.Flow(recipe.features, first)
    zoom, source, blur = 1, normals.x, 0.0
    if normals.double is not None:
        zoom, source, blur = 2, normals.double, matching_blur(normals.x, normals.double)
    augment: Augment | None = None
    if recipe.augmentation == "rotations":
        augment = rotations(recipe.shape, recipe.angles, zoom=zoom, blur=blur)
    elif recipe.augmentation != "none":
        augment = shifts(recipe.shape, recipe.shift_radius, recipe.shift_step, zoom=zoom)
    if augment is not None and first:
        augment = _then(augment, before)
    # A logit stretches the 8-bit quantisation steps by its slope, which is smallest in the middle.
    floor = QUANTISATION if recipe.logit is None else QUANTISATION * (4 * (1 - 2 * recipe.logit)) ** 2
    parts = [torch.from_numpy(fold) for fold in folds]
    x = before(normals.x)[0] if first else normals.x
    options: dict[str, Any] = {"augment": augment, "source": source, "floor": floor, "seed": recipe.seed}
    return Whitenings(*fastmaf.GaussianWhitening.fit_without(x, recipe.factors, parts, **options))


def _then(augment: Augment, before: fastmaf.Flow) -> Augment:
    """Returns the augmentation followed by a flow: mixtures are of pixels, so each copy is written out."""

    @torch.no_grad()
    def copies(x: Tensor) -> tuple[Tensor, Tensor]:
        basis, weights = augment(x)
        mixed = torch.einsum("cp,npd->ncd", weights, basis)
        return before(mixed.flatten(0, 1))[0].unflatten(0, mixed.shape[:2]), torch.eye(len(weights)).to(mixed)

    return copies


def select_augmentation(
    normals: Normals, folds: Sequence[np.ndarray], recipe: Recipe, done: Callable[[], object]
) -> tuple[Recipe, Whitenings, dict[str, Any]]:
    """Compares augmentations, and none, on held-out images.

    Of many images, a random 128 are compared first, with at most 200 factors and two of 4 folds. What is best there is
    then compared with none on all images: the more images there are, the less an augmentation adds. This is left out
    where the gain is clear, as it falls with the number of images.

    Args:
        normals: the good images.
        folds: the indices of each fold.
        recipe: ``augmentation="auto"`` selects the best. Any other is compared with none, and kept.
        done: called after each of the comparisons and fits.

    Returns:
        The recipe with the selected augmentation; its whitenings; and the mean NLLs in nats of held-out images that
        decided, for the model's record.

    Warns:
        UserWarning: held-out images are less likely without the augmentation, or the logit, that the recipe asks for.
    """
    candidates, n = _candidates(recipe), len(normals.x)
    some, some_folds, compared = normals, folds, recipe
    if n > _COMPARED:
        index = np.sort(np.random.default_rng([recipe.seed, 1]).permutation(n)[:_COMPARED])
        some_folds = [np.flatnonzero(np.isin(index, fold)) for fold in joined_folds(folds)]
        some_folds = [fold for fold in some_folds if len(fold)][:_COMPARED_FOLDS]
        some, compared = (
            normals.subset(torch.from_numpy(index)),
            replace(recipe, rank=min(recipe.factors, _COMPARED_RANK)),
        )
    tried: dict[Augmentation, float] = {}
    found: dict[Augmentation, Whitenings] = {}
    for kind in candidates if len(candidates) > 1 else ():
        with_kind = replace(compared, augmentation=kind)
        found[kind] = fit_whitenings(some, some_folds, with_kind)
        tried[kind] = _held_out_nll(some, some_folds, with_kind, found[kind])
        done()
    best = min(candidates, key=lambda kind: tried.get(kind, 0.0))
    selected = best if recipe.augmentation == "auto" else recipe.augmentation
    if some is not normals:
        found, nll = {}, dict[Augmentation, float]()
        gain = tried.get("none", 0.0) - tried.get(selected, 0.0)
        clear = selected != "none" and gain * len(some.x) / n > _CLEAR * recipe.features
        for kind in dict.fromkeys((selected, "none")) if len(candidates) > 1 and not clear else (selected,):
            with_kind = replace(recipe, augmentation=kind)
            found[kind] = fit_whitenings(normals, folds, with_kind)
            if not clear:
                nll[kind] = _held_out_nll(normals, folds, with_kind, found[kind])
            done()
        if len(nll) > 1 and nll["none"] < nll[selected]:
            tried, best = nll, "none"
            selected = best if recipe.augmentation == "auto" else selected
    elif not found:
        found[selected] = fit_whitenings(normals, folds, recipe)
        done()
    if tried and tried[selected] > tried[best]:
        _warn(f"augmentation={selected!r}", tried[selected], tried[best], "augmentation='auto'")
    recipe, plain = replace(recipe, augmentation=selected), None
    if recipe.logit is not None:
        with_logit = _held_out_nll(normals, folds, recipe, found[selected])
        without = replace(recipe, logit=None)
        plain = _held_out_nll(normals, folds, without, fit_whitenings(normals, folds, without))
        done()
        if with_logit > plain:
            _warn(f"logit={recipe.logit:g}", with_logit, plain, "logit=None")
    figures = {
        "held_out_nll_of_augmentations": {str(kind): value for kind, value in tried.items()},
        "held_out_nll_without_logit": plain,
    }
    return recipe, found[selected], figures


def count_fits(recipe: Recipe, n: int) -> int:
    """Returns how often ``select_augmentation`` calls ``done`` for n images, at most."""
    candidates = len(_candidates(recipe))
    some = 0 if candidates == 1 else candidates
    return some + (min(2, candidates) if n > _COMPARED or not some else 0) + (recipe.logit is not None)


def _candidates(recipe: Recipe) -> tuple[Augmentation, ...]:
    return AUGMENTATIONS if recipe.augmentation == "auto" else tuple(dict.fromkeys((recipe.augmentation, "none")))


def _warn(part: str, nll: float, other: float, alternative: str) -> None:
    warnings.warn(
        f"{part} makes held-out images less likely (NLL {nll:,.0f} nats with it, {other:,.0f} without); it is kept as "
        f"requested, {alternative} drops it",
        stacklevel=6,
    )


def _held_out_nll(normals: Normals, folds: Sequence[np.ndarray], recipe: Recipe, whitenings: Whitenings) -> float:
    """Returns the mean NLL of the images of each fold under the whitening without it."""
    first = before_whitening(recipe)
    nll = [
        FlowValues(fastmaf.Flow(recipe.features, [*first, whitening]), normals.x[fold]).nll
        for fold, whitening in zip(folds, whitenings.folds, strict=True)
    ]
    return float(torch.cat(nll).mean())
