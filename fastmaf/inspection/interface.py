"""What every kind of inspection model offers, and what a fit needs to compare kinds with each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.model import InspectionModel, Prediction, Shapes


class AnomalyModel(Protocol):
    """A fitted and calibrated model: of pixels, of patches, of features, or several of them together."""

    @property
    def calibration(self) -> Calibration:
        """Held-out scores of good images and the threshold taken from them."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """Details of the training, plain JSON types."""
        ...

    @property
    def size(self) -> int:
        """Side of the square images that it takes."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        ...

    @property
    def map_levels(self) -> tuple[float, float]:
        """The 99th percentile and the maximum of the anomaly maps of held-out good images."""
        ...

    def predict(self, pixels: Tensor, shapes: Shapes | None = None, *, nll: bool = True) -> Prediction:
        """Returns scores, anomaly maps and NLLs of images, uint8 ``[n, 3, size, size]``.

        Args:
            pixels: the images.
            shapes: (height, width) of each before it became square, for models that see it at its own aspect ratio;
                None: all were square.
            nll: whether the NLLs are needed; else they may be NaN.
        """
        ...

    def with_calibration(self, calibration: Calibration) -> AnomalyModel:
        """Returns the same model with another calibration."""
        ...

    def save(self, path: str | Path, *, card: str | Path | None = None) -> None:
        """Writes the model to one safetensors file, and its model card to ``card``."""
        ...


class OfPart:
    """Properties of a model that turns or frames images first: those of ``part``, the model of the changed images."""

    part: AnomalyModel

    @property
    def calibration(self) -> Calibration:
        """Held-out scores of changed good images and the threshold taken from them."""
        return self.part.calibration

    @property
    def about(self) -> dict[str, Any]:
        """Details of the training of the part."""
        return self.part.about

    @property
    def device(self) -> torch.device:
        """The device that the part computes on."""
        return self.part.device

    @property
    def map_levels(self) -> tuple[float, float]:
        """Range of an overlay's colours: the 99th percentile and the maximum of the anomaly maps of good images."""
        return self.part.map_levels


def scores_of(model: AnomalyModel, pixels: Tensor, shapes: Shapes | None = None) -> np.ndarray:
    """Returns the scores that a model predicts; without the maps and the NLL, if it can do without."""
    if isinstance(model, InspectionModel):
        return model.scores(pixels)
    return model.predict(pixels, shapes, nll=False).scores


def maps_of(model: AnomalyModel, pixels: Tensor, shapes: Shapes | None = None) -> np.ndarray:
    """Returns the anomaly maps that a model predicts; without the rest, if it can do without."""
    if isinstance(model, InspectionModel):
        return model.anomaly_maps(pixels)
    return model.predict(pixels, shapes, nll=False).anomaly_maps


def map_shape(model: AnomalyModel) -> tuple[int, int]:
    """Returns height and width at which the anomaly maps of a model have the aspect ratio that it was fitted to.

    They come as squares; those of a texture, and of features alone, stay squares.
    """
    if isinstance(model, InspectionModel):
        return model.shape
    for part in getattr(model, "parts", ()):
        height, width = map_shape(part)
        if height != width:
            scale = model.size / max(height, width)
            return round(scale * height), round(scale * width)
    return model.size, model.size


class HeldOut(NamedTuple):
    """Scores, float64 ``[sets, n]``, and anomaly maps, float32 ``[sets, n, s, s]``, of images a model has not seen."""

    scores: np.ndarray
    maps: np.ndarray


def same_images(first: Tensor, second: Tensor) -> bool:
    """Returns whether two sets hold the same images, so that results need not be computed again."""
    return first is second or (first.shape == second.shape and torch.equal(first, second))


class Candidate(Protocol):
    """A model that a fit may choose, with the models of the folds behind it."""

    @property
    def name(self) -> str:
        """For the report, such as ``"128 pixels"``."""
        ...

    @property
    def size(self) -> int:
        """Side of the square images that ``held_out`` takes."""
        ...

    def held_out(self, sets: Sequence[Tensor]) -> HeldOut:
        """Returns scores and anomaly maps of each image by the model of the fold that left it out.

        Args:
            sets: sets of images, uint8 ``[n, 3, size, size]``, each in the order of the good images that it was fitted
                to: these images themselves first, then the same with a synthetic defect.
        """
        ...

    def model(self) -> AnomalyModel:
        """Returns the model of all images, calibrated on the held-out scores."""
        ...
