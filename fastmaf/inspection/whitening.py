"""The Gaussian whitening of a recipe, fitted to good images and to shifts or rotations of them.

The augmentation is selected by held-out likelihood.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

import fastmaf
from fastmaf.inspection.out_of_fold import drop_fold
from fastmaf.inspection.recipe import AUGMENTATIONS, QUANTISATION, Augmentation, Recipe
from fastmaf.inspection.scoring.float64_flow import FlowValues

_DECIDING_IMAGES = 8  # held-out images that the comparison of augmentations uses at least

Augment: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images ``[n, 3 size²]`` -> a basis ``[n, p, 3 size²]`` and weights ``[copies, p]``."""


def shifts(size: int, radius: int = 2, step: float = 0.5) -> Augment:
    """Shifts square RGB images by up to ``radius`` steps along each axis: (2 radius + 1)² copies.

    Positions between pixels are interpolated bilinearly, so every copy is a mixture of shifts by whole pixels. Those
    form the basis, and ``fastmaf.GaussianWhitening.fit_`` computes nothing else. Edges are repeated.

    Args:
        size: side of the images in pixels.
        radius: largest shift in steps; 0 for the images alone.
        step: in pixels.
    """
    if size < 1 or radius < 0 or not step > 0:
        raise ValueError(f"size must be at least 1, radius at least 0, step positive; found {size}, {radius}, {step}")
    whole = math.ceil(radius * step)
    offsets = step * torch.arange(-radius, radius + 1, dtype=torch.float64)
    axis = (1 - (offsets[:, None] - torch.arange(-whole, whole + 1)).abs()).clamp_min(0).float()
    weights = torch.kron(axis, axis)

    def augment(x: Tensor) -> tuple[Tensor, Tensor]:
        images = x.unflatten(1, (3, size, size))
        if whole:
            images = pad(images, (whole,) * 4, mode="replicate")
        steps = range(2 * whole + 1)
        basis = [images[:, :, i : i + size, j : j + size].flatten(1) for i in steps for j in steps]
        return torch.stack(basis, dim=1), weights.to(x)

    return augment


def rotations(size: int, angles: int = 12) -> Augment:
    """Rotates square RGB images counter-clockwise about their centre by multiples of 360° / ``angles``.

    For objects that lie at any angle. Interpolation is bilinear; edges are repeated. The weights are an identity
    matrix.
    """
    if size < 1 or angles < 1:
        raise ValueError(f"size and angles must be at least 1; found {size} and {angles}")
    turns = torch.arange(angles) * (2 * math.pi / angles)
    rows = torch.stack([turns.cos(), -turns.sin(), 0 * turns, turns.sin(), turns.cos(), 0 * turns], dim=1)

    def augment(x: Tensor) -> tuple[Tensor, Tensor]:
        images, basis = x.unflatten(1, (3, size, size)), []
        for turn in rows.to(x).unflatten(1, (2, 3)):
            grid = affine_grid(turn.expand(len(x), 2, 3), list(images.shape), align_corners=False)
            rotated = grid_sample(images, grid, padding_mode="border", align_corners=False)
            basis.append(rotated.flatten(1))
        return torch.stack(basis, dim=1), torch.eye(angles).to(x)

    return augment


def before_whitening(recipe: Recipe) -> list[fastmaf.Transform]:
    """Returns the transforms before the whitening: the recipe's logit, if any."""
    return [] if recipe.logit is None else [fastmaf.Logit(recipe.features, recipe.logit)]


def fit_whitening(x: Tensor, recipe: Recipe) -> fastmaf.GaussianWhitening:
    """Returns a whitening fitted to good images ``[n, D]`` with the recipe's augmentation (shifts if ``"auto"``)."""
    augment = None
    if recipe.augmentation == "rotations":
        augment = rotations(recipe.size, recipe.angles)
    elif recipe.augmentation != "none":
        augment = shifts(recipe.size, recipe.shift_radius, recipe.shift_step)
    whitening = fastmaf.GaussianWhitening(recipe.features, min(recipe.rank, recipe.features))
    # A logit stretches the 8-bit quantisation steps by its slope, which is smallest in the middle.
    floor = QUANTISATION if recipe.logit is None else QUANTISATION * (4 * (1 - 2 * recipe.logit)) ** 2
    return whitening.fit_(x, augment=augment, folds=recipe.folds, floor=floor, seed=recipe.seed)


def select_augmentation(
    x: Tensor, folds: Sequence[np.ndarray], recipe: Recipe, done: Callable[[], object]
) -> tuple[Recipe, list[fastmaf.GaussianWhitening], dict[str, Any]]:
    """Compares augmentations, and none, on held-out images.

    Args:
        x: good images ``[n, D]``, as their NLL is measured.
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
