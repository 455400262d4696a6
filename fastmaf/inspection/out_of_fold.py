"""Folds, and what the models of the folds give for the images that they have not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import image_shape, to_unit
from fastmaf.inspection.scoring.float64_flow import Float64Flow, FlowValues
from fastmaf.inspection.scoring.score import (
    MergedStatistics,
    Shape,
    TermStatistics,
    image_scores,
    score_maps,
    terms_of,
)
from fastmaf.inspection.scoring.settings import ScoreSettings
from fastmaf.threads import map_on_threads

_BATCH = 64
_REFERENCE = 100  # training images whose statistics standardise terms: with 200, as many drawn defects were found


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


def some_references(n: int, fold: np.ndarray) -> np.ndarray:
    """Returns the indices of the images, of all n but a fold, whose terms ``training_statistics`` uses."""
    others = np.delete(np.arange(n), fold)
    return others[some_of(len(others), _REFERENCE, 0)]


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
        shape: (height, width) of the images that the flows model; None: they are square.
    """

    folds: Sequence[np.ndarray]
    flows: Sequence[fastmaf.Flow]
    shape: Shape | None = None

    @property
    def channels(self) -> int:
        """Of the images that the flows model."""
        features = self.flows[0].features
        return image_shape(features)[0] if self.shape is None else features // math.prod(self.shape)

    def with_flows(self, flows: Sequence[fastmaf.Flow], folds: Sequence[np.ndarray] | None = None) -> OutOfFoldModels:
        """Returns other models of the same images, and of the same folds unless others are given."""
        return replace(self, flows=flows, folds=self.folds if folds is None else folds)

    def held_out(self, sets: Sequence[Tensor], quantity: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Returns a quantity of each image under the model that has not seen it, float64 ``[len(sets), n, ...]``.

        Args:
            sets: sets of images ``[n, D]``, each in the order of the folds: the good images, or the same images with
                a synthetic defect.
            quantity: a function of the ``FlowValues`` of one fold's images and of ``arguments``.
        """
        return self.held_out_each(sets, [lambda values: quantity(values, *arguments)])[0]

    def held_out_each(
        self, sets: Sequence[Tensor], quantities: Sequence[Callable[[FlowValues], Tensor]]
    ) -> list[Tensor]:
        """Returns several quantities, each as ``held_out`` does, of one evaluation of the models."""

        def of_fold(k: int) -> list[list[Tensor]]:
            double = Float64Flow(self.flows[k])  # a few at a time: each needs twice the memory of its flow
            found: list[list[Tensor]] = [[] for _ in quantities]
            for x in sets:
                values = FlowValues(double, x[self.folds[k]])
                for of_sets, quantity in zip(found, quantities, strict=True):
                    of_sets.append(quantity(values))
            return found

        of_folds = map_on_threads(of_fold, range(len(self.folds)))
        results = []
        for q in range(len(quantities)):
            first = of_folds[0][q][0]
            result = first.new_empty(len(sets), len(sets[0]), *first.shape[1:])
            for fold, of_quantities in zip(self.folds, of_folds, strict=True):
                for i, values in enumerate(of_quantities[q]):
                    result[i, fold] = values
            results.append(result)
        return results

    def subset(self, most: int, seed: int) -> tuple[np.ndarray, OutOfFoldModels]:
        """Returns at most so many images, at random, and the models with the folds of these; folds are renumbered."""
        n = sum(len(fold) for fold in self.folds)
        index = some_of(n, most, seed)
        if n <= most:
            return index, self
        folds = [np.flatnonzero(np.isin(index, fold)) for fold in self.folds]
        kept = [(fold, flow) for fold, flow in zip(folds, self.flows, strict=True) if len(fold)]
        return index, self.with_flows([flow for _, flow in kept], [fold for fold, _ in kept])

    def nll(self, x: Tensor) -> Tensor:
        """Returns the held-out NLL of images ``[n, D]``, float64 ``[n]`` nats."""
        return self.held_out([x], lambda values: values.nll)[0]

    def references(
        self,
        x: Tensor,
        terms: Tensor,
        nll: Tensor,
        settings: ScoreSettings,
        training: Sequence[TermStatistics] | None = None,
    ) -> list[TermStatistics]:
        """Returns the statistics of the other folds that standardise the terms of each; see ``reference_statistics``.

        Args:
            x: the good images ``[n, D]``.
            terms: their held-out terms ``[n, T]``.
            nll: their held-out NLLs ``[n]``.
            settings: how terms become a score.
            training: ``training_statistics`` of each fold's model, if they are known.
        """
        of_folds = map_on_threads(lambda fold: MergedStatistics.of_terms(terms[fold], nll[fold]), self.folds)

        def reference(k: int) -> TermStatistics:
            held_out = MergedStatistics.of(of_folds[:k] + of_folds[k + 1 :]).finished()
            if training is not None and settings.uses_training:
                return training[k].on_scale_of(held_out)
            return reference_statistics(self.flows[k], drop_fold(x, self.folds[k]), held_out, settings, self.shape)

        return map_on_threads(reference, range(len(self.folds)))

    def scores(
        self, terms: Tensor, nll: Tensor, references: Sequence[TermStatistics], settings: ScoreSettings
    ) -> Tensor:
        """Returns held-out scores, float64 ``[sets, n]``.

        Args:
            terms: held-out terms ``[sets, n, T]``.
            nll: held-out NLLs ``[sets, n]``.
            references: of each fold.
            settings: how terms become a score.
        """
        scores = torch.empty(nll.shape, dtype=torch.float64)

        def score(k: int) -> None:
            fold, others = self.folds[k], references[k]
            for i in range(len(terms)):
                maps = score_maps(terms[i, fold], others, settings, self.shape)
                scores[i, fold] = image_scores(maps, nll[i, fold], others, settings)

        map_on_threads(score, range(len(self.folds)))
        return scores


@torch.no_grad()
def reference_statistics(
    flow: fastmaf.Flow | Float64Flow,
    images: Tensor,
    held_out: TermStatistics,
    settings: ScoreSettings,
    shape: Shape | None = None,
) -> TermStatistics:
    """Returns the statistics that standardise the terms of a flow, as ``settings.reference`` says.

    Args:
        flow: the flow.
        images: good images that it was fitted to, uint8 ``[n, 3, h, w]``, or on [0, 1] ``[n, D]``; at most 100 of
            them are used.
        held_out: of the terms of images that models like it have not seen.
        settings: how terms become a score.
        shape: (height, width) of the images that the flow models; None: they are square.
    """
    if not settings.uses_training:
        return held_out
    double = Float64Flow(flow) if isinstance(flow, fastmaf.Flow) else flow
    return training_statistics(double, images, settings, shape).on_scale_of(held_out)


@torch.no_grad()
def training_statistics(
    flow: Float64Flow, images: Tensor, settings: ScoreSettings, shape: Shape | None = None
) -> TermStatistics:
    """Returns the statistics of the terms of images that a flow was fitted to; see ``reference_statistics``."""
    some = images[torch.from_numpy(some_of(len(images), _REFERENCE, 0))]
    channels = image_shape(flow.features)[0] if shape is None else flow.features // math.prod(shape)
    merged = MergedStatistics()
    for part in some.split(_BATCH):
        x = to_unit(part, channels) if part.dtype == torch.uint8 else part
        merged.add(terms_of(FlowValues(flow, x), settings, shape), torch.zeros(len(part)))
    return merged.finished()
