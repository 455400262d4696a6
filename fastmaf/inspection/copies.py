"""The whitening of a fit, and what it is fitted to: the normals alone, or shifted or turned copies of them, too."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.augment import rotated_copies, shifted_copies
from fastmaf.inspection.cross import without
from fastmaf.inspection.float64 import Evaluated
from fastmaf.inspection.recipe import COPIES, QUANTISATION, Copies, Recipe

_ENOUGH = 8  # held-out images that decide, in as many folds as it takes


@dataclass(frozen=True, eq=False)
class CopiesFound:
    """Which copies were taken and why.

    Attributes:
        recipe: with the copies by which held-out images are likeliest, or those that it asked for.
        whitenings: with these copies, of the first folds.
        nll: mean NLL of the held-out images of these folds in nats, by kind of copies; none where nothing was compared.
        nll_without_logit: the same with these copies, but without the recipe's logit; None where it has none.
    """

    recipe: Recipe
    whitenings: list[fastmaf.GaussianWhitening]
    nll: dict[str, float]
    nll_without_logit: float | None


def choose_copies(
    x: Tensor, folds: Sequence[np.ndarray], recipe: Recipe, done: Callable[[], object] = lambda: None
) -> CopiesFound:
    """Compares kinds of copies, and no copies, on images that were held out.

    Args:
        x: normals ``[n, D]``, as the NLL is of.
        folds: their indices, fold by fold. The first ones decide, as many as hold out 8 images.
        recipe: ``copies="auto"`` takes the likeliest. Others are compared with none, and taken.
        done: called after each whitening.

    Warns:
        UserWarning: held-out images are likelier without the copies, or the logit, that the recipe asks for.
    """
    folds = folds[: _deciding(recipe, len(x))]
    kinds = _kinds(recipe)
    tried: dict[Copies, tuple[list[fastmaf.GaussianWhitening], float]] = {}
    for kind in kinds:
        tried[kind] = _held_out(x, folds, replace(recipe, copies=kind), done)
    best = min(kinds, key=lambda kind: tried[kind][1])
    chosen = best if recipe.copies == "auto" else recipe.copies
    whitenings, nll = tried[chosen]
    if nll > tried[best][1]:
        _warn(f"copies={chosen!r}", nll, tried[best][1], "copies='auto'")
    recipe, plain = replace(recipe, copies=chosen), None
    if recipe.logit is not None:
        plain = _held_out(x, folds, replace(recipe, logit=None), done)[1]
        if nll > plain:
            _warn(f"logit={recipe.logit:g}", nll, plain, "logit=None")
    compared = {str(kind): value for kind, (_, value) in tried.items()} if len(tried) > 1 else {}
    return CopiesFound(recipe, whitenings, compared, plain)


def _deciding(recipe: Recipe, n: int) -> int:
    """Returns how many folds decide."""
    return min(recipe.folds, math.ceil(_ENOUGH * recipe.folds / n))


def _kinds(recipe: Recipe) -> tuple[Copies, ...]:
    """Returns the kinds of copies that are compared, or the one that there is."""
    return COPIES if recipe.copies == "auto" else tuple(dict.fromkeys((recipe.copies, "none")))


def compared_whitenings(recipe: Recipe, n: int) -> int:
    """Returns how many whitenings of n images are fitted for comparison alone."""
    return _deciding(recipe, n) * (len(_kinds(recipe)) - 1 + (recipe.logit is not None))


def _warn(part: str, nll: float, other: float, instead: str) -> None:
    warnings.warn(
        f"{part} makes held-out images less likely: an NLL of {nll:,.0f} nats with it, {other:,.0f} without; it was "
        f"asked for and kept; {instead} leaves it out",
        stacklevel=5,
    )


def _held_out(
    x: Tensor, folds: Sequence[np.ndarray], recipe: Recipe, done: Callable[[], object]
) -> tuple[list[fastmaf.GaussianWhitening], float]:
    """Returns the whitening without each fold, and the mean NLL of the images of these folds."""
    first = before_whitening(recipe)
    y, whitenings, nll = fastmaf.Flow(recipe.features, first)(x)[0], [], []
    for fold in folds:
        whitenings.append(fit_whitening(without(y, fold), recipe))
        nll.append(Evaluated(fastmaf.Flow(recipe.features, [*first, whitenings[-1]]), x[fold]).nll)
        done()
    return whitenings, float(torch.cat(nll).mean())


def before_whitening(recipe: Recipe) -> list[fastmaf.Transform]:
    """Returns what a flow begins with: the recipe's logit, if any."""
    return [] if recipe.logit is None else [fastmaf.Logit(recipe.features, recipe.logit)]


def fit_whitening(x: Tensor, recipe: Recipe) -> fastmaf.GaussianWhitening:
    """Returns the whitening of normals ``[n, D]`` and their copies, shifted ones where the recipe leaves that open."""
    if recipe.copies == "none":
        copies = None
    elif recipe.copies == "rotations":
        copies = rotated_copies(recipe.size, recipe.angles)
    else:
        copies = shifted_copies(recipe.size, recipe.shift_radius, recipe.shift_step)
    made = fastmaf.GaussianWhitening(recipe.features, min(recipe.rank, recipe.features))
    # A logit stretches the steps of 8 bits by its slope, which is least in the middle.
    floor = QUANTISATION if recipe.logit is None else QUANTISATION * (4 * (1 - 2 * recipe.logit)) ** 2
    return made.fit_(x, augment=copies, folds=recipe.folds, floor=floor, seed=recipe.seed)
