"""A fitted model of pixels as a candidate, which a fit compares with others by scores of held-out images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import to_unit
from fastmaf.inspection.fit import Fitted
from fastmaf.inspection.interface import HeldOut
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.scoring.float64_flow import Float64Flow, FlowValues
from fastmaf.inspection.scoring.score import (
    MergedStatistics,
    anomaly_maps,
    image_scores,
    residuals_of,
    score_maps,
    terms_of,
)

_BATCH = 64


@dataclass(frozen=True, eq=False)
class PixelCandidate:
    """The models of a fit, of all images and of the folds; see ``fastmaf.inspection.interface.Candidate``.

    Attributes:
        fitted: the result of ``fit``.
        label: name for the report; None: its size.
    """

    fitted: Fitted
    label: str | None = None

    @property
    def name(self) -> str:
        """For the report."""
        return self.label or f"{self.size} pixels"

    @property
    def size(self) -> int:
        """Side of the square images that ``held_out`` takes."""
        return self.fitted.model.size

    def model(self) -> InspectionModel:
        """Returns the model of all images, calibrated on the held-out scores."""
        return self.fitted.model

    @fastmaf.torch_defaults()
    def held_out(self, sets: Sequence[Tensor]) -> HeldOut:
        """Returns scores and anomaly maps of each image by the model of the fold that left it out.

        Terms are standardised by their statistics over the other folds of the first set; see
        ``OutOfFoldModels.scores``. One batch is in memory at a time.

        Args:
            sets: as in ``fastmaf.inspection.interface.Candidate``.
        """
        model, models = self.fitted.model, self.fitted.out_of_fold
        statistics = []
        for fold, flow in zip(models.folds, models.flows, strict=True):
            merged = MergedStatistics()
            for _, values in self._batches(Float64Flow(flow), sets[0], fold):
                merged.add(terms_of(values, model.settings), self._nll(values))
            statistics.append(merged)
        shape = len(sets), len(sets[0])
        scores, maps = np.empty(shape), np.empty((*shape, self.size, self.size), np.float32)
        for k, (fold, flow) in enumerate(zip(models.folds, models.flows, strict=True)):
            others = MergedStatistics.of([s for i, s in enumerate(statistics) if i != k]).finished()
            double = Float64Flow(flow)
            for i, images in enumerate(sets):
                for index, values in self._batches(double, images, fold):
                    of_score = score_maps(terms_of(values, model.settings), others, model.settings)
                    scores[i, index] = image_scores(of_score, self._nll(values), others, model.settings).numpy()
                    residuals = residuals_of(values, model.map_config)
                    maps[i, index] = anomaly_maps(residuals, model.map_config).float().numpy()
        return HeldOut(scores, maps)

    def _nll(self, values: FlowValues) -> Tensor:
        return values.nll if self.fitted.model.settings.needs_nll else torch.zeros(len(values.x), dtype=torch.float64)

    def _batches(self, flow: Float64Flow, images: Tensor, fold: np.ndarray) -> Iterator[tuple[np.ndarray, FlowValues]]:
        for start in range(0, len(fold), _BATCH):
            index = fold[start : start + _BATCH]
            yield index, FlowValues(flow, to_unit(images[torch.from_numpy(index)], self.fitted.model.channels))
