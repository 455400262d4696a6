"""The Gaussian whitening of a recipe, fitted to normal images and to shifts or rotations of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

import fastmaf
from fastmaf.inspection.recipe import QUANTISATION, Recipe

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
    axis = torch.zeros(2 * radius + 1, 2 * whole + 1)
    for row, k in enumerate(range(-radius, radius + 1)):
        below = math.floor(k * step)
        share = k * step - below
        axis[row, below + whole] += 1 - share
        if share:
            axis[row, below + 1 + whole] += share
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
    """Returns a whitening fitted to normal images ``[n, D]`` with the recipe's augmentation (shifts if ``"auto"``)."""
    augment = None
    if recipe.augmentation == "rotations":
        augment = rotations(recipe.size, recipe.angles)
    elif recipe.augmentation != "none":
        augment = shifts(recipe.size, recipe.shift_radius, recipe.shift_step)
    whitening = fastmaf.GaussianWhitening(recipe.features, min(recipe.rank, recipe.features))
    # A logit stretches the 8-bit quantisation steps by its slope, which is smallest in the middle.
    floor = QUANTISATION if recipe.logit is None else QUANTISATION * (4 * (1 - 2 * recipe.logit)) ** 2
    return whitening.fit_(x, augment=augment, folds=recipe.folds, floor=floor, seed=recipe.seed)
