"""What the models of the folds say of the images that each left out: where statistics and scores come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.location import Location, location_maps, residuals
from fastmaf.inspection.scores import ScoreSettings, TermStatistics, image_scores, maps_of, terms_and_nll


@dataclass(frozen=True, eq=False)
class CrossFit:
    """The models of the folds, and what they say of the images that each left out, in the order of the images.

    Attributes:
        folds: indices of the images of each fold.
        flows: the flow fitted without each fold.
        whitened_nll: NLL by the whitening alone, float64 [n] nats; of dequantised values where the recipe says so.
        nll: NLL by the whole flow, likewise.
    """

    folds: Sequence[np.ndarray]
    flows: Sequence[fastmaf.Flow]
    whitened_nll: np.ndarray
    nll: np.ndarray


def cross_scores(
    x: Tensor, flows: Sequence[fastmaf.Flow], folds: Sequence[np.ndarray], settings: ScoreSettings, size: int
) -> tuple[TermStatistics, Tensor]:
    """Returns the statistics of held-out terms, and held-out scores, float64 ``[n]``.

    A fold's terms are standardised by those of the other folds: by its own, the scores would be a little too small.
    """
    terms, nll = torch.empty_like(x), torch.empty(len(x), dtype=torch.float64)
    for fold, flow in zip(folds, flows, strict=True):
        terms[fold], nll[fold] = terms_and_nll(flow, x[fold], settings)
    scores = torch.empty(len(x), dtype=torch.float64)
    for fold in folds:
        others = TermStatistics.of(without(terms, fold), without(nll, fold))
        scores[fold] = image_scores(maps_of(terms[fold], others, settings, size), nll[fold], others, settings)
    return TermStatistics.of(terms, nll), scores


def cross_maps(
    x: Tensor, flows: Sequence[fastmaf.Flow], folds: Sequence[np.ndarray], location: Location
) -> tuple[Location, Tensor]:
    """Returns ``location`` with its unit, and the maps of held-out images."""
    residual = torch.empty_like(x)
    for fold, flow in zip(folds, flows, strict=True):
        residual[fold] = residuals(flow, x[fold], location)
    maps = location_maps(residual, replace(location, usual=1.0))
    usual = float(maps.double().square().mean().sqrt()) or 1.0  # images that are all the same leave nothing
    return replace(location, usual=usual), maps / usual


def without(x: Tensor, fold: np.ndarray) -> Tensor:
    """Returns the rows of ``x`` that are not in ``fold``."""
    kept = torch.ones(len(x), dtype=torch.bool)
    kept[fold] = False
    return x[kept]
