"""A model that is ready to inspect: a flow, how its terms become a score, and what that score is for normal images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import check_takes_images, to_unit
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.float64 import Evaluated, Float64Flow
from fastmaf.inspection.location import Location, location_maps, residuals_of
from fastmaf.inspection.model_schema import KEY, inspection_record
from fastmaf.inspection.scores import ScoreSettings, TermStatistics, image_scores, maps_of, terms_of
from fastmaf.io.safe_json import shown
from fastmaf.io.tensor_file import read_tensors
from fastmaf.training.checkpoints import MODEL_FILE

_BATCH = 64
_SCORED_IN = "float64"  # what a file says of its calibration scores
_LARGEST = 1e18  # of a statistic of the terms; its square is finite in float32


@dataclass(frozen=True, eq=False)
class Assessment:
    """What a model says of images: ``scores`` float64 [n]; ``maps`` float32 [n, s, s], of root mean square 1 over
    normal images; ``nll`` float64 [n] in nats.
    """

    scores: np.ndarray
    maps: np.ndarray
    nll: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, eq=False)
class InspectionModel:
    """A flow over square RGB images, the score taken from it, and its calibration.

    Attributes:
        flow: D = 3 size².
        settings: how terms become a score.
        location: how the map is made of where an image is anomalous.
        statistics: of the terms over normals that the flow had not seen.
        calibration: scores of such normals and the threshold taken from them.
        about: what the file says of the training, plain JSON types.
    """

    flow: fastmaf.Flow
    settings: ScoreSettings
    location: Location
    statistics: TermStatistics
    calibration: Calibration
    about: dict[str, Any] = field(default_factory=dict)
    _double: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return math.isqrt(self.flow.features // 3)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.statistics.mean.device

    @property
    def map_levels(self) -> tuple[float, float]:
        """Where a heat map's colours begin, the 99th percentile of normal maps, and where they end, at their largest
        value.
        """
        low, high = (float(level) for level in self.about["map_levels"])
        return low, max(high, low + 1e-6)

    @property
    def float64_flow(self) -> Float64Flow:
        """The flow in float64, by which images are scored; made anew where a tensor of the flow has changed."""
        tensors = (*self.flow.parameters(), *self.flow.buffers())
        state = tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)
        if self._double.get("state") != state:
            self._double.update(state=state, flow=Float64Flow(self.flow))
        found: Float64Flow = self._double["flow"]
        return found

    @fastmaf.torch_defaults()
    def assess(self, pixels: Tensor) -> Assessment:
        """Scores images, uint8 ``[n, 3, size, size]``.

        What is said of an image depends on that image alone, not on the batch: see ``fastmaf.inspection.float64``.

        Raises:
            ValueError: the images are of another size or type.
        """
        scores, maps, nll = [], [], []
        for part in self._parts(pixels):
            scores.append(self._scores(part))
            maps.append(self._maps(part))
            nll.append(part.nll.cpu())
        return Assessment(*(torch.cat(part).numpy() for part in (scores, maps, nll)))

    @fastmaf.torch_defaults()
    def scores(self, pixels: Tensor) -> np.ndarray:
        """Returns the scores of ``assess`` alone, float64 ``[n]``; no NLL is computed where they are not made of it."""
        return torch.cat([self._scores(part) for part in self._parts(pixels)]).numpy()

    @fastmaf.torch_defaults()
    def maps(self, pixels: Tensor) -> np.ndarray:
        """Returns the maps of ``assess`` alone, float32 ``[n, size, size]``."""
        return torch.cat([self._maps(part) for part in self._parts(pixels)]).numpy()

    def _parts(self, pixels: Tensor) -> Iterator[Evaluated]:
        """Yields images that are being evaluated, a batch at a time; an empty one where there are none."""
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"pixels must be uint8 [n, 3, {self.size}, {self.size}]; found {pixels.dtype} {list(pixels.shape)}"
            )
        for part in pixels.split(_BATCH):
            yield Evaluated(self.float64_flow, to_unit(part).to(self.device))

    def _scores(self, part: Evaluated) -> Tensor:
        nll = part.nll if self.settings.needs_nll else part.x.new_zeros(len(part.x))
        heat = maps_of(terms_of(part, self.settings), self.statistics, self.settings, self.size)
        return image_scores(heat, nll, self.statistics, self.settings).cpu()

    def _maps(self, part: Evaluated) -> Tensor:
        return location_maps(residuals_of(part, self.location), self.location).float().cpu()

    def with_calibration(self, calibration: Calibration) -> InspectionModel:
        """Returns the same model with another calibration."""
        return replace(self, calibration=calibration)

    @fastmaf.torch_defaults()
    def save(self, path: str | Path) -> None:
        """Writes everything to one safetensors file; a crash leaves the old one or the new one."""
        own = {
            "settings": asdict(self.settings),
            "location": asdict(self.location),
            "nll": self.statistics.nll,
            "about": {**self.about, "scored_in": _SCORED_IN},
            "calibration": self.calibration.to_json(with_scores=False),
        }
        extras = {
            "term_mean": self.statistics.mean,
            "term_deviation": self.statistics.deviation,
            "calibration_scores": torch.from_numpy(np.array(self.calibration.scores)),
        }
        self.flow.save(path, {KEY: json.dumps(own)}, extras)


def is_inspection_model(path: str | Path) -> bool:
    """Says whether a file, or the model file in a run's folder, was written by ``InspectionModel.save``.

    Raises:
        FileNotFoundError: there is none.
        fastmaf.CheckpointError: it is no safetensors file.
    """
    return KEY in read_tensors(model_file(path), tensors=False)[1]


def model_file(path: str | Path) -> Path:
    """Returns the model file that a path names: itself, or the one in a run's folder."""
    path = Path(path)
    return path / MODEL_FILE if path.is_dir() else path


@fastmaf.torch_defaults()
def load_inspection(path: str | Path, *, device: str = "cpu") -> InspectionModel:
    """Loads what ``InspectionModel.save`` wrote, or the model file in a run's folder.

    Raises:
        FileNotFoundError: there is none.
        fastmaf.CheckpointError: it is no inspection model, or damaged.
    """
    path = model_file(path)
    flow, metadata, extras = fastmaf.load_with_extras(path)
    if KEY not in metadata:
        raise fastmaf.CheckpointError(
            f"{path} is not an inspection model: expected one that 'fastmaf train --recipe inspection' wrote"
        )
    check_takes_images(flow, path)
    try:
        record = inspection_record(metadata)
        if not len(flow.transforms):
            raise ValueError("a flow without a transform has no terms to score")
        mean, deviation = (_terms(f"term_{name}", extras, flow.features) for name in ("mean", "deviation"))
        scores = extras.get("calibration_scores")
        if scores is None or scores.dtype != torch.float64:
            found = "nothing" if scores is None else scores.dtype
            raise ValueError(f"tensor calibration_scores: expected torch.float64; found {found}")
        calibration = Calibration.from_json(record["calibration"], scores.numpy())
        # Scores used to be float32, and those of a "split" are this very model's: an image may have been the threshold.
        if record["about"].get("scored_in") != _SCORED_IN and calibration.how == "split":
            calibration = calibration.raised()
    except ValueError as error:
        raise fastmaf.CheckpointError(f"{path}: {error}") from error
    return InspectionModel(
        flow.eval().to(device),
        ScoreSettings(**record["settings"]),
        Location(**record["location"]),
        TermStatistics(mean.to(device), deviation.to(device), float(record["nll"])),
        calibration,
        record["about"],
    )


def _terms(name: str, extras: Mapping[str, Tensor], features: int) -> Tensor:
    """Returns a statistic of the terms, whose values neither overflow nor divide by zero in float32."""
    found = extras.get(name)
    if found is None or found.shape != (features,) or found.dtype not in (torch.float32, torch.float64):
        what = "nothing" if found is None else f"{shown(tuple(found.shape))} {found.dtype}"
        raise ValueError(f"tensor {name}: expected ({features},) torch.float32; found {what}")
    sizes = found.abs()
    if not bool((sizes <= _LARGEST).all()) or (name == "term_deviation" and not bool((found >= 1 / _LARGEST).all())):
        least = f"at least {1 / _LARGEST:g} and " if name == "term_deviation" else ""
        raise ValueError(f"tensor {name}: expected finite numbers, {least}at most {_LARGEST:g} in size")
    return found
