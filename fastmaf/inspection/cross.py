"""What the models of the folds say of the images that each left out: where statistics and scores come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.float64 import Evaluated, Float64Flow
from fastmaf.inspection.location import Location, location_maps, residuals_of
from fastmaf.inspection.scores import ScoreSettings, TermStatistics, image_scores, maps_of, terms_of


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

    def held_out(self, sets: Sequence[Tensor], quantity: Callable[[Evaluated], Tensor]) -> Tensor:
        """Returns a quantity of each image by the model that has not seen it; see ``held_out``."""
        return held_out(sets, self.flows, self.folds, quantity)


def held_out(
    sets: Sequence[Tensor],
    flows: Sequence[fastmaf.Flow],
    folds: Sequence[np.ndarray],
    quantity: Callable[[Evaluated], Tensor],
) -> Tensor:
    """Returns a quantity of each image by the model of the fold that left it out, float64 ``[len(sets), n, ...]``.

    Args:
        sets: images ``[n, D]``, each in the order of the folds: the normals, or those with something drawn onto them.
        flows, folds: the models, and the images that each left out.
        quantity: of images that are being evaluated.
    """
    found: Tensor | None = None
    for fold, flow in zip(folds, flows, strict=True):
        double = Float64Flow(flow)  # one at a time: each takes twice the memory of its flow
        for i, x in enumerate(sets):
            values = quantity(Evaluated(double, x[fold]))
            found = values.new_empty(len(sets), len(x), *values.shape[1:]) if found is None else found
            found[i, fold] = values
    assert found is not None
    return found


def cross_scores(
    x: Tensor, flows: Sequence[fastmaf.Flow], folds: Sequence[np.ndarray], settings: ScoreSettings, size: int
) -> tuple[TermStatistics, Tensor]:
    """Returns the statistics of held-out terms, and held-out scores, float64 ``[n]``.

    A fold's terms are standardised by those of the other folds: by its own, the scores would be a little too small.
    """

    def both(found: Evaluated) -> Tensor:
        return torch.cat([terms_of(found, settings), found.nll[:, None]], dim=1)

    terms, nll = held_out([x], flows, folds, both)[0].split([x.shape[1], 1], dim=1)
    nll = nll[:, 0]
    scores = torch.empty(len(x), dtype=torch.float64)
    for fold in folds:
        others = TermStatistics.of(without(terms, fold), without(nll, fold))
        scores[fold] = image_scores(maps_of(terms[fold], others, settings, size), nll[fold], others, settings)
    return TermStatistics.of(terms, nll), scores


def cross_maps(
    x: Tensor, flows: Sequence[fastmaf.Flow], folds: Sequence[np.ndarray], location: Location
) -> tuple[Location, Tensor]:
    """Returns ``location`` with its unit, and the maps of held-out images."""
    (residual,) = held_out([x], flows, folds, partial(residuals_of, location=location))
    maps = location_maps(residual, replace(location, usual=1.0))
    usual = float(maps.square().mean().sqrt()) or 1.0  # images that are all the same leave nothing
    return replace(location, usual=usual), (maps / usual).float()


def without(x: Tensor, fold: np.ndarray) -> Tensor:
    """Returns the rows of ``x`` that are not in ``fold``."""
    kept = torch.ones(len(x), dtype=torch.bool)
    kept[fold] = False
    return x[kept]
