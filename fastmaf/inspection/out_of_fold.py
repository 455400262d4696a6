"""Folds, and what the models of the folds give for the images that they have not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import image_shape, to_unit
from fastmaf.inspection.scoring.float64_flow import Float64Flow, FlowValues
from fastmaf.inspection.scoring.score import (
    MergedStatistics,
    TermStatistics,
    anomaly_maps,
    image_scores,
    residuals_of,
    score_maps,
    terms_of,
)
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.threads import map_on_threads

_BATCH = 64


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
    from sklearn.model_selection import GroupKFold  # slow to import

    splitter = GroupKFold(min(folds, known))
    return [test for _, test in splitter.split(np.zeros(len(groups)), groups=np.asarray(groups))]


def some_of(n: int, most: int, seed: int) -> np.ndarray:
    """Returns the indices of at most so many of n images, at random, ascending."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng([seed, 2]).permutation(n)[:most])


def joined_folds(folds: Sequence[np.ndarray], most: int = 4) -> list[np.ndarray]:
    """Returns folds joined into at most ``most``, for comparisons that need no more of them."""
    return [np.sort(np.concatenate(folds[i::most])) for i in range(min(len(folds), most))]


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

        def of_fold(k: int) -> list[Tensor]:
            double = Float64Flow(self.flows[k])  # a few at a time: each needs twice the memory of its flow
            return [quantity(FlowValues(double, x[self.folds[k]]), *arguments) for x in sets]

        of_folds = map_on_threads(of_fold, range(len(self.folds)))
        first = of_folds[0][0]
        result = first.new_empty(len(sets), len(sets[0]), *first.shape[1:])
        for fold, of_sets in zip(self.folds, of_folds, strict=True):
            for i, values in enumerate(of_sets):
                result[i, fold] = values
        return result

    def subset(self, most: int, seed: int) -> tuple[np.ndarray, OutOfFoldModels]:
        """Returns at most so many images, at random, and the models with the folds of these; folds are renumbered."""
        n = sum(len(fold) for fold in self.folds)
        index = some_of(n, most, seed)
        if n <= most:
            return index, self
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
        of_folds = map_on_threads(lambda fold: MergedStatistics.of_terms(terms[0, fold], nll[0, fold]), self.folds)

        def score(k: int) -> None:
            fold, others = self.folds[k], MergedStatistics.of(of_folds[:k] + of_folds[k + 1 :]).finished()
            for i in range(len(terms)):
                maps = score_maps(terms[i, fold], others, settings)
                scores[i, fold] = image_scores(maps, nll[i, fold], others, settings)

        map_on_threads(score, range(len(self.folds)))
        return scores


class OutOfFoldResults(NamedTuple):
    """What the models of the folds give for images that they have not seen.

    Attributes:
        statistics: of the terms of the first set.
        scores: float64 ``[sets, n]``.
        maps: anomaly maps, float32 ``[sets, n, s, s]``.
    """

    statistics: TermStatistics
    scores: np.ndarray
    maps: np.ndarray


@torch.no_grad()
def out_of_fold_results(
    sets: Sequence[Tensor], models: OutOfFoldModels, settings: ScoreSettings, config: AnomalyMapConfig
) -> OutOfFoldResults:
    """Returns held-out scores and anomaly maps of sets of images, one batch in memory at a time.

    The terms of a fold are standardised by the statistics of the other folds of the first set: by its own statistics
    its scores would be slightly too small.

    Args:
        sets: uint8 ``[n, 3, s, s]``, each in the order of the folds: the good images first, then the same with a
            synthetic defect.
        models: the models of the folds.
        settings: how terms become a score.
        config: how the anomaly map is computed.
    """

    def statistics(k: int) -> MergedStatistics:
        merged = MergedStatistics()
        for _, values in _batches(Float64Flow(models.flows[k]), sets[0], models.folds[k], models.channels):
            merged.add(terms_of(values, settings), _nll(values, settings))
        return merged

    of_folds = map_on_threads(statistics, range(len(models.folds)))
    shape, side = (len(sets), len(sets[0])), sets[0].shape[-1]
    scores, maps = np.empty(shape), np.empty((*shape, side, side), np.float32)

    def score(k: int) -> None:
        others, double = MergedStatistics.of(of_folds[:k] + of_folds[k + 1 :]).finished(), Float64Flow(models.flows[k])
        for i, images in enumerate(sets):
            for index, values in _batches(double, images, models.folds[k], models.channels):
                of_score = score_maps(terms_of(values, settings), others, settings)
                scores[i, index] = image_scores(of_score, _nll(values, settings), others, settings).numpy()
                maps[i, index] = anomaly_maps(residuals_of(values, config), config).float().numpy()

    map_on_threads(score, range(len(models.folds)))
    return OutOfFoldResults(MergedStatistics.of(of_folds).finished(), scores, maps)


def _nll(values: FlowValues, settings: ScoreSettings) -> Tensor:
    return values.nll if settings.needs_nll else torch.zeros(len(values.x), dtype=torch.float64)


def _batches(
    flow: Float64Flow, images: Tensor, fold: np.ndarray, channels: int
) -> Iterator[tuple[np.ndarray, FlowValues]]:
    for start in range(0, len(fold), _BATCH):
        index = fold[start : start + _BATCH]
        yield index, FlowValues(flow, to_unit(images[torch.from_numpy(index)], channels))
