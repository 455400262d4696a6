"""A masked autoregressive flow of whitened features, given their position: what a Gaussian leaves unexplained.

The whitened features z of a location have mean 0 and covariance 1, but their channels depend on each other in other
ways, and where one Gaussian serves all locations, on the position. A MAF of z with the position as its context models
both. Each image's z is that of the Gaussian without its fold, and its likelihood is that of a MAF that was trained on
the images of the other half of the folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.blocks import Adam, one_cycle
from fastmaf.inspection.features.gaussian import Folds
from fastmaf.transforms.fallback import without_warning

_HIDDEN = 128
_STEPS, _BATCH, _LR = 300, 512, 3e-3
_LEAST = 10_000  # whitened features of all images and locations: fewer do not support a MAF
_HALVES = 2


def positions(grid: tuple[int, int]) -> Tensor:
    """Returns the rows and columns of locations on [-1, 1], float32 ``[L, 2]``."""
    axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in grid]
    return torch.cartesian_prod(*axes)


def with_maf(
    x: Tensor, folds: Sequence[np.ndarray], gaussians: Folds, grid: tuple[int, int], seed: int
) -> Folds | None:
    """Returns the Gaussians followed by a MAF; None if held-out images are no more likely with it, or too few.

    Args:
        x: features of the good images, float32 ``[n, C, L]``.
        folds: indices of the images of each.
        gaussians: fitted without each fold, and to all.
        grid: rows and columns, L in total.
        seed: of the MAF's weights and batches.
    """
    if len(x) * x.shape[2] < _LEAST:
        return None
    places = positions(grid)
    z = x.new_empty(len(x), x.shape[2], x.shape[1])
    for fold, gaussian in zip(folds, gaussians.folds, strict=True):
        z[fold] = gaussian.whitened(x[torch.from_numpy(fold)])
    of_folds = list(gaussians.folds)
    for half in range(_HALVES):
        held = range(half, len(folds), _HALVES)
        flow = _trained(z, np.concatenate([folds[i] for i in range(len(folds)) if i not in held]), places, seed)
        before = after = 0.0
        for i in held:
            combined = replace(of_folds[i], flow=flow, positions=places)
            for gaussian in (of_folds[i], combined):
                features = x[torch.from_numpy(folds[i])]
                total = float(gaussian.nll(gaussian.distances(features)).sum())
                before, after = (before + total, after) if gaussian is of_folds[i] else (before, after + total)
            of_folds[i] = combined
        if not after < before:
            return None
    whole = replace(gaussians.whole, flow=_trained(z, np.arange(len(x)), places, seed), positions=places)
    return Folds(of_folds, whole, gaussians.shrinkage)


@without_warning()
def _trained(z: Tensor, images: np.ndarray, places: Tensor, seed: int) -> fastmaf.Flow:
    """Returns a MAF trained on the whitened features ``[n, L, C]`` of some images."""
    flow = fastmaf.MAF(z.shape[2], blocks=1, hidden_features=(_HIDDEN,), context_features=2, seed=seed)
    adam = Adam(list(flow.parameters()))
    generator, index = torch.Generator().manual_seed(seed), torch.from_numpy(images)
    for step in range(_STEPS):
        image = index[torch.randint(len(index), (_BATCH,), generator=generator)]
        place = torch.randint(len(places), (_BATCH,), generator=generator)
        with torch.enable_grad():
            loss = -flow.log_prob(z[image, place], places[place]).mean() / z.shape[2]
            adam.step(loss, _LR * one_cycle(step / (_STEPS - 1)))
    return flow.eval().requires_grad_(False)
