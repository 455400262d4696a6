"""What the models of the folds give for sets of images that they have not seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastmaf.images.dataset import to_unit
from fastmaf.inspection.out_of_fold import OutOfFoldModels, reference_statistics, some_references
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

TermsKey: TypeAlias = tuple[str, float, float]
"""The settings that determine the terms of a score: their source, the smoothing before, the power of the level."""


def terms_key(settings: ScoreSettings) -> TermsKey:
    """Returns what two scores of the same terms have in common."""
    return settings.source, settings.presmooth_sigma, settings.level_power


class OutOfFoldResults(NamedTuple):
    """What the models of the folds give for images that they have not seen.

    Attributes:
        held_out: statistics of the terms of the first set.
        scores: float64 ``[sets, n]``.
        maps: anomaly maps, float32 ``[sets, n, h, w]``.
    """

    held_out: TermStatistics
    scores: np.ndarray
    maps: np.ndarray


@dataclass(frozen=True, eq=False)
class HeldOutTerms:
    """Terms and anomaly maps of sets of images for several scores and maps, from one evaluation of the models.

    Attributes:
        terms: by ``terms_key``, float64 ``[sets, n, T]``.
        training: by ``terms_key``, the statistics of images that the model of each fold was fitted to.
        maps: by their configuration, in its unit, float32 ``[sets, n, h, w]``.
    """

    terms: dict[TermsKey, Tensor]
    training: dict[TermsKey, list[TermStatistics]]
    maps: dict[AnomalyMapConfig, Tensor]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        models: OutOfFoldModels,
        sets: Sequence[Tensor],
        scores: Sequence[ScoreSettings],
        maps: Sequence[AnomalyMapConfig],
    ) -> HeldOutTerms:
        """Evaluates the models.

        Args:
            models: of the folds.
            sets: on [0, 1] ``[n, D]``, each in the order of the folds: the good images first, then the same with a
                synthetic defect.
            scores: of which the terms are wanted; none of them needs an NLL.
            maps: the wanted ones.
        """
        by_key = {terms_key(settings): settings for settings in scores}

        def of_fold(k: int) -> tuple[list[Tensor], list[TermStatistics], list[Tensor]]:
            double, fold = Float64Flow(models.flows[k]), models.folds[k]
            values = FlowValues(double, torch.cat([images[fold] for images in sets]))
            terms = [terms_of(values, settings, models.shape) for settings in by_key.values()]
            found = [anomaly_maps(residuals_of(values, c), c, models.shape).float() for c in maps]
            others = FlowValues(double, sets[0][some_references(len(sets[0]), fold)])
            training = [
                TermStatistics.of(terms_of(others, settings, models.shape), torch.zeros(len(others.x)))
                for settings in by_key.values()
            ]
            return terms, training, found

        of_folds = map_on_threads(of_fold, range(len(models.folds)))

        def joined(parts: Sequence[Tensor]) -> Tensor:
            result = parts[0].new_empty(len(sets), len(sets[0]), *parts[0].shape[1:])
            for fold, part in zip(models.folds, parts, strict=True):
                result[:, fold] = part.unflatten(0, (len(sets), len(fold)))
            return result

        terms, training, found = ([*zip(*each, strict=True)] for each in zip(*of_folds, strict=True))
        return cls(
            {key: joined(parts) for key, parts in zip(by_key, terms, strict=True)},
            {key: list(parts) for key, parts in zip(by_key, training, strict=True)},
            {config: joined(parts) for config, parts in zip(maps, found, strict=True)},
        )

    def results(
        self, models: OutOfFoldModels, sets: int, settings: ScoreSettings, config: AnomalyMapConfig
    ) -> OutOfFoldResults:
        """Returns what ``out_of_fold_results`` returns for the first sets; the unit of the maps may be another."""
        key, nll = terms_key(settings), torch.zeros(self.size, dtype=torch.float64)
        terms = self.terms[key][:sets]
        references = models.references(terms[0], terms[0], nll[0], settings, self.training[key])
        scores = models.scores(terms, nll[:sets], references, settings)
        known = next(other for other in self.maps if replace(other, rms=config.rms) == config)
        maps = self.maps[known][:sets].numpy() * np.float32(known.rms / config.rms)
        return OutOfFoldResults(TermStatistics.of(terms[0], nll[0]), scores.numpy(), maps)

    @property
    def size(self) -> tuple[int, int]:
        """The number of sets and of images in each."""
        first = next(iter(self.terms.values()))
        return first.shape[0], first.shape[1]


@torch.no_grad()
def out_of_fold_results(
    sets: Sequence[Tensor],
    models: OutOfFoldModels,
    settings: ScoreSettings,
    config: AnomalyMapConfig,
    known: HeldOutTerms | None = None,
) -> OutOfFoldResults:
    """Returns held-out scores and anomaly maps of sets of images, one batch in memory at a time.

    The terms of a fold are standardised by statistics of the other folds; see ``reference_statistics``.

    Args:
        sets: uint8 ``[n, 3, h, w]``, each in the order of the folds: the good images first, then the same with a
            synthetic defect.
        models: the models of the folds.
        settings: how terms become a score.
        config: how the anomaly map is computed.
        known: the terms and maps of these sets, if they are known; for a score of whitened terms.
    """
    if known is not None:
        return known.results(models, len(sets), settings, config)

    def statistics(k: int) -> MergedStatistics:
        merged = MergedStatistics()
        for _, values in _batches(Float64Flow(models.flows[k]), sets[0], models.folds[k], models.channels):
            merged.add(terms_of(values, settings, models.shape), _nll(values, settings))
        return merged

    of_folds = map_on_threads(statistics, range(len(models.folds)))
    shape = len(sets), len(sets[0])
    scores, maps = np.empty(shape), np.empty((*shape, *sets[0].shape[2:]), np.float32)

    def score(k: int) -> None:
        held_out, double = (
            MergedStatistics.of(of_folds[:k] + of_folds[k + 1 :]).finished(),
            Float64Flow(models.flows[k]),
        )
        training = np.concatenate([fold for i, fold in enumerate(models.folds) if i != k])
        images = sets[0][torch.from_numpy(np.sort(training))]
        others = reference_statistics(double, images, held_out, settings, models.shape)
        for i, images in enumerate(sets):
            for index, values in _batches(double, images, models.folds[k], models.channels):
                of_score = score_maps(terms_of(values, settings, models.shape), others, settings, models.shape)
                scores[i, index] = image_scores(of_score, _nll(values, settings), others, settings).numpy()
                maps[i, index] = anomaly_maps(residuals_of(values, config), config, models.shape).float().numpy()

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
