"""Folds, and what the models of the folds give for the images that they have not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import GroupKFold
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import image_shape
from fastmaf.inspection.scoring.float64_flow import Float64Flow, FlowValues
from fastmaf.inspection.scoring.score import (
    TermStatistics,
    anomaly_maps,
    image_scores,
    residuals_of,
    score_maps,
    terms_of,
)
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings


def k_fold(n: int, folds: int, seed: int = 0) -> list[np.ndarray]:
    """Splits 0..n-1 into random folds whose sizes differ by at most one; indices ascend within each fold.

    Raises:
        ValueError: there are fewer than 2 or more than n folds.
    """
    if not 2 <= folds <= n:
        raise ValueError(f"folds must be a whole number from 2 to the {n} good images available; found {folds!r}")
    order = np.random.default_rng(seed).permutation(n)
    return [np.sort(fold) for fold in np.array_split(order, folds)]


def group_folds(groups: Sequence[str], folds: int) -> list[np.ndarray]:
    """Splits images into folds of whole groups, of similar sizes; at most as many folds as there are groups.

    Raises:
        ValueError: there are fewer than two groups.
    """
    known = len(set(groups))
    if known < 2:
        raise ValueError(f"groups must name at least two groups; found {known}")
    splitter = GroupKFold(min(folds, known))
    return [test for _, test in splitter.split(np.zeros(len(groups)), groups=np.asarray(groups))]


def drop_fold(x: Tensor, fold: np.ndarray) -> Tensor:
    """Returns the rows of ``x`` that are not in ``fold``."""
    kept = torch.ones(len(x), dtype=torch.bool)
    kept[fold] = False
    return x[kept]


@dataclass(frozen=True, eq=False)
class OutOfFoldModels:
    """One model per fold, fitted without the images of that fold.

    Attributes:
        folds: indices of the images of each fold.
        flows: the flow fitted without each fold.
    """

    folds: Sequence[np.ndarray]
    flows: Sequence[fastmaf.Flow]

    @property
    def channels(self) -> int:
        """Of the images that the flows model."""
        return image_shape(self.flows[0].features)[0]

    def held_out(self, sets: Sequence[Tensor], quantity: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Returns a quantity of each image under the model that has not seen it, float64 ``[len(sets), n, ...]``.

        Args:
            sets: sets of images ``[n, D]``, each in the order of the folds: the good images, or the same images with
                a synthetic defect.
            quantity: a function of the ``FlowValues`` of one fold's images and of ``arguments``.
        """
        result: Tensor | None = None
        for fold, flow in zip(self.folds, self.flows, strict=True):
            double = Float64Flow(flow)  # one at a time: each needs twice the memory of its flow
            for i, x in enumerate(sets):
                values = quantity(FlowValues(double, x[fold]), *arguments)
                result = values.new_empty(len(sets), len(x), *values.shape[1:]) if result is None else result
                result[i, fold] = values
        assert result is not None
        return result

    def subset(self, most: int, seed: int) -> tuple[np.ndarray, OutOfFoldModels]:
        """Returns at most so many images, at random, and the models with the folds of these; folds are renumbered."""
        n = sum(len(fold) for fold in self.folds)
        if n <= most:
            return np.arange(n), self
        index = np.sort(np.random.default_rng([seed, 2]).permutation(n)[:most])
        folds = [np.flatnonzero(np.isin(index, fold)) for fold in self.folds]
        kept = [(fold, flow) for fold, flow in zip(folds, self.flows, strict=True) if len(fold)]
        return index, OutOfFoldModels([fold for fold, _ in kept], [flow for _, flow in kept])

    def nll(self, x: Tensor) -> Tensor:
        """Returns the held-out NLL of images ``[n, D]``, float64 ``[n]`` nats."""
        return self.held_out([x], lambda values: values.nll)[0]

    def scores(self, terms: Tensor, nll: Tensor, settings: ScoreSettings) -> Tensor:
        """Returns held-out scores, float64 ``[sets, n]``.

        The terms of a fold are standardised by the statistics of the other folds of the first set: by its own
        statistics its scores would be slightly too small.

        Args:
            terms: held-out terms ``[sets, n, D]``.
            nll: held-out NLLs ``[sets, n]``.
            settings: how terms become a score.
        """
        scores = torch.empty(nll.shape, dtype=torch.float64)
        for fold in self.folds:
            others = TermStatistics.of(drop_fold(terms[0], fold), drop_fold(nll[0], fold))
            for i in range(len(terms)):
                maps = score_maps(terms[i, fold], others, settings)
                scores[i, fold] = image_scores(maps, nll[i, fold], others, settings)
        return scores


def out_of_fold_scores(x: Tensor, models: OutOfFoldModels, settings: ScoreSettings) -> tuple[TermStatistics, Tensor]:
    """Returns the statistics of held-out terms of images ``[n, D]``, and held-out scores, float64 ``[n]``."""

    def terms_and_nll(values: FlowValues) -> Tensor:
        return torch.cat([terms_of(values, settings), values.nll[:, None]], dim=1)

    terms, nll = models.held_out([x], terms_and_nll).split([x.shape[1], 1], dim=2)
    return TermStatistics.of(terms[0], nll[0, :, 0]), models.scores(terms, nll[..., 0], settings)[0]


def out_of_fold_maps(x: Tensor, models: OutOfFoldModels, config: AnomalyMapConfig) -> tuple[AnomalyMapConfig, Tensor]:
    """Returns ``config`` with its unit fitted, and the anomaly maps of held-out images ``[n, s, s]``."""
    (residuals,) = models.held_out([x], residuals_of, config)
    maps = anomaly_maps(residuals, replace(config, rms=1.0))
    rms = float(maps.square().mean().sqrt()) or 1.0  # identical images leave no residual
    return replace(config, rms=rms), (maps / rms).float()
