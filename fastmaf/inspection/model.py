"""An inspection model: a flow, how its terms become a score, and the scores of good images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import check_takes_images, image_shape, to_unit
from fastmaf.images.reduce import reduced
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.map_shapes import squared
from fastmaf.inspection.model_card import inspection_card
from fastmaf.inspection.model_file import is_inspection_model, load_inspection, model_file
from fastmaf.inspection.model_schema import KEY, inspection_record
from fastmaf.inspection.scoring.float64_flow import Float64Flow, FlowValues, check_base
from fastmaf.inspection.scoring.score import (
    Shape,
    TermStatistics,
    anomaly_maps,
    image_scores,
    residuals_of,
    score_maps,
    terms_of,
)
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.io.checkpoint import read_with_extras
from fastmaf.io.safe_json import shown
from fastmaf.io.tensor_file import TensorFile

__all__ = ["InspectionModel", "Prediction", "is_inspection_model", "load_inspection", "model_file", "read_model"]

_BATCH = 64
_SCORED_IN = "float64"  # the dtype of the calibration scores, as recorded in a file
_LARGEST = 1e18  # of a statistic of the terms; its square is finite in float32


Shapes: TypeAlias = Sequence[tuple[int, int]]
"""(height, width) of images before they became square."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """Predictions for images.

    Attributes:
        scores: anomaly scores, float64 [n].
        anomaly_maps: float32 [n, s, s], with root mean square 1 over good images.
        nll: float64 [n] in nats; NaN where it was not asked for.
    """

    scores: np.ndarray
    anomaly_maps: np.ndarray
    nll: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


def check_pixels(pixels: Tensor, size: int) -> None:
    """Raises ValueError unless pixels are uint8 ``[n, 3, size, size]``."""
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, size, size):
        raise ValueError(f"pixels must be uint8 [n, 3, {size}, {size}]; found {pixels.dtype} {list(pixels.shape)}")


def map_levels_of(about: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the levels in the details of a model, which are not equal."""
    low, high = (float(level) for level in about["map_levels"])
    return low, max(high, low + 1e-6)


@dataclass(frozen=True, eq=False)
class InspectionModel:
    """A flow over images, its score and anomaly map, and its calibration.

    Images are square when they come; one whose images were not reduces a side, see ``fastmaf.inspection.aspect``.

    Attributes:
        flow: D = 3 h w, or h w for grey images.
        settings: how terms become a score.
        map_config: how the anomaly map is computed.
        statistics: of the terms over good images, which standardise them; see ``ScoreSettings.reference``.
        calibration: scores of such images and the threshold taken from them.
        about: details of the training, plain JSON types.
        own_shape: (h, w) of the images that the flow models; None: they are square.
    """

    flow: fastmaf.Flow
    settings: ScoreSettings
    map_config: AnomalyMapConfig
    statistics: TermStatistics
    calibration: Calibration
    about: dict[str, Any] = field(default_factory=dict)
    own_shape: Shape | None = None
    _float64: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def size(self) -> int:
        """Side of the square images that it takes, in pixels."""
        return max(self.shape)

    @property
    def shape(self) -> Shape:
        """(h, w) of the images that the flow models, in pixels."""
        return self.own_shape or (image_shape(self.flow.features)[1],) * 2

    @property
    def channels(self) -> int:
        """1 for a model of grey images, to which others are converted; else 3."""
        return self.flow.features // math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.statistics.mean.device

    @property
    def map_levels(self) -> tuple[float, float]:
        """Range of an overlay's colours: the 99th percentile and the maximum of the anomaly maps of good images."""
        return map_levels_of(self.about)

    @property
    def float64_flow(self) -> Float64Flow:
        """The flow in float64, used for scoring; rebuilt when a tensor of the flow has changed."""
        tensors = (*self.flow.parameters(), *self.flow.buffers())
        state = tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)
        if self._float64.get("state") != state:
            self._float64.update(state=state, flow=Float64Flow(self.flow))
        flow: Float64Flow = self._float64["flow"]
        return flow

    @fastmaf.torch_defaults()
    def predict(self, pixels: Tensor, shapes: Shapes | None = None, *, nll: bool = True) -> Prediction:
        """Returns scores, anomaly maps and NLLs of images, uint8 ``[n, 3, size, size]``; ``shapes`` are not used.

        Without ``nll`` the blocks, which take two thirds of the time, are not evaluated, and the NLLs are NaN,
        unless the score needs them.

        Results do not depend on the batch that an image is in: see ``fastmaf.inspection.scoring.float64_flow``.

        Raises:
            ValueError: the images have another size or type.
        """
        parts = [
            (
                self._scores(values),
                self._anomaly_maps(values),
                values.nll.cpu()
                if nll or self.settings.needs_nll
                else torch.full((len(values.x),), math.nan, dtype=torch.float64),
            )
            for values in self._batches(pixels)
        ]
        return Prediction(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))

    @fastmaf.torch_defaults()
    def scores(self, pixels: Tensor) -> np.ndarray:
        """Returns the scores of ``predict`` only, float64 ``[n]``; the NLL is computed only if they need it."""
        return torch.cat([self._scores(values) for values in self._batches(pixels)]).numpy()

    @fastmaf.torch_defaults()
    def anomaly_maps(self, pixels: Tensor) -> np.ndarray:
        """Returns the anomaly maps of ``predict`` only, float32 ``[n, size, size]``."""
        return torch.cat([self._anomaly_maps(values) for values in self._batches(pixels)]).numpy()

    def _batches(self, pixels: Tensor) -> Iterator[FlowValues]:
        """Yields the images in batches; one empty batch if there are none."""
        check_pixels(pixels, self.size)
        for part in pixels.split(_BATCH):
            x = to_unit(reduced(part, self.shape), self.channels)
            yield FlowValues(self.float64_flow, x.to(self.device))

    def _scores(self, values: FlowValues) -> Tensor:
        nll = values.nll if self.settings.needs_nll else values.x.new_zeros(len(values.x))
        terms = terms_of(values, self.settings, self.shape)
        maps = score_maps(terms, self.statistics, self.settings, self.shape)
        return image_scores(maps, nll, self.statistics, self.settings).cpu()

    def _anomaly_maps(self, values: FlowValues) -> Tensor:
        maps = anomaly_maps(residuals_of(values, self.map_config), self.map_config, self.shape).float().cpu()
        return torch.from_numpy(squared(maps.numpy(), self.size))

    def with_calibration(self, calibration: Calibration) -> InspectionModel:
        """Returns the same model with another calibration."""
        return replace(self, calibration=calibration)

    @fastmaf.torch_defaults()
    def save(self, path: str | Path, *, card: str | Path | None = None) -> None:
        """Writes the model to one safetensors file, and its model card to ``card``; see ``fastmaf.Flow.save``.

        A crash leaves the old file or the new one.
        """
        record: dict[str, Any] = {
            "settings": asdict(self.settings),
            "map_config": asdict(self.map_config),
            "nll": self.statistics.nll,
            "about": {**self.about, "scored_in": _SCORED_IN},
            "calibration": self.calibration.to_json(),
        }
        if self.shape[0] != self.shape[1]:
            record["shape"] = list(self.shape)
        extras = {
            "term_mean": self.statistics.mean,
            "term_deviation": self.statistics.deviation,
            "calibration_scores": torch.from_numpy(np.array(self.calibration.scores)),
        }
        filled = None if card is None else inspection_card(card, self.shape, self.calibration, self.about)
        self.flow.save(path, {KEY: json.dumps(record)}, extras, card=filled)


def read_model(file: TensorFile, *, device: str = "cpu") -> InspectionModel:
    """Reads what ``InspectionModel.save`` wrote from an open file, or from a part of one; see ``load_inspection``."""
    path = file.path
    flow, metadata, extras = read_with_extras(file)
    try:
        record = inspection_record(metadata)
        own_shape = tuple(record["shape"]) if "shape" in record else None
        check_takes_images(flow, path, grey=True, shape=own_shape)
        settings, map_config = ScoreSettings(**record["settings"]), AnomalyMapConfig(**record["map_config"])
        if not len(flow.transforms):
            raise ValueError("a flow without a transform has no terms to score")
        check_base(flow)
        height, width = own_shape or (image_shape(flow.features)[1],) * 2
        terms = height * width if settings.source == "pixels" else flow.features
        mean, deviation = (_statistic(f"term_{name}", extras, terms) for name in ("mean", "deviation"))
        scores = extras.get("calibration_scores")
        if scores is None or scores.dtype != torch.float64:
            found = "nothing" if scores is None else scores.dtype
            raise ValueError(f"tensor calibration_scores: expected torch.float64; found {found}")
        calibration = Calibration.from_json(record["calibration"], scores.numpy())
        # Earlier versions scored in float32. Scores of a "split" come from this model, so one image may have been the
        # threshold itself.
        if record["about"].get("scored_in") != _SCORED_IN and calibration.how == "split":
            calibration = calibration.raised()
    except fastmaf.CheckpointError:
        raise
    except ValueError as error:
        raise fastmaf.CheckpointError(f"{path}: {error}") from error
    return InspectionModel(
        flow.eval().to(device),
        settings,
        map_config,
        TermStatistics(mean.to(device), deviation.to(device), float(record["nll"])),
        calibration,
        record["about"],
        own_shape,
    )


def _statistic(name: str, extras: Mapping[str, Tensor], terms: int) -> Tensor:
    """Returns a statistic of the terms, checked to neither overflow nor divide by zero in float32."""
    values = extras.get(name)
    if values is None or values.shape != (terms,) or values.dtype not in (torch.float32, torch.float64):
        found = "nothing" if values is None else f"{shown(tuple(values.shape))} {values.dtype}"
        raise ValueError(f"tensor {name}: expected ({terms},) torch.float32; found {found}")
    positive = name == "term_deviation"
    if not bool((values.abs() <= _LARGEST).all()) or (positive and not bool((values >= 1 / _LARGEST).all())):
        least = f"at least {1 / _LARGEST:g} and " if positive else ""
        raise ValueError(f"tensor {name}: expected finite numbers, {least}at most {_LARGEST:g} in size")
    return values
