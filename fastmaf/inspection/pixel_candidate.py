"""A fitted model of pixels as a candidate, which a fit compares with others by scores of held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

import fastmaf
from fastmaf.images.reduce import reduced
from fastmaf.inspection.fit import Fitted
from fastmaf.inspection.held_out_terms import out_of_fold_results
from fastmaf.inspection.interface import HeldOut
from fastmaf.inspection.map_shapes import squared
from fastmaf.inspection.model import InspectionModel


@dataclass(frozen=True, eq=False)
class PixelCandidate:
    """The models of a fit, of all images and of the folds; see ``fastmaf.inspection.interface.Candidate``.

    Attributes:
        fitted: the result of ``fit``.
        label: name for the report; None: the size of its recipe.
    """

    fitted: Fitted
    label: str | None = None

    @property
    def name(self) -> str:
        """For the report."""
        return self.label or f"{self.fitted.model.about['recipe']['size']} pixels"

    @property
    def size(self) -> int:
        """Side of the square images that ``held_out`` takes."""
        return self.fitted.model.size

    def model(self) -> InspectionModel:
        """Returns the model of all images, calibrated on the held-out scores."""
        return self.fitted.model

    def subset(self, most: int, seed: int) -> tuple[np.ndarray, PixelCandidate]:
        """Returns at most so many of the good images, at random, and the candidate for these."""
        index, models = self.fitted.out_of_fold.subset(most, seed)
        return index, replace(self, fitted=replace(self.fitted, out_of_fold=models))

    @fastmaf.torch_defaults()
    def held_out(self, sets: Sequence[Tensor]) -> HeldOut:
        """Returns scores and anomaly maps of each image by the model of the fold that left it out.

        See ``out_of_fold_results``.

        Args:
            sets: as in ``fastmaf.inspection.interface.Candidate``.
        """
        model = self.fitted.model
        own = [reduced(images, model.shape) for images in sets]
        _, scores, maps = out_of_fold_results(own, self.fitted.out_of_fold, model.settings, model.map_config)
        return HeldOut(scores, np.stack([squared(of_set, model.size) for of_set in maps]))
