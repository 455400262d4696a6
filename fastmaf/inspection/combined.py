"""Several inspection models as one: the sum of their standardised scores, and the mean of their standardised maps.

A combined file is the files of its parts in one: names of tensors and keys of the metadata begin with the number of the
part, ``"0/"``, ``"1/"``, and so on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.reduce import reduced
from fastmaf.inspection.calibration import CALIBRATION, Calibration
from fastmaf.inspection.interface import AnomalyModel, HeldOut
from fastmaf.inspection.map_shapes import squared
from fastmaf.inspection.model import Prediction, Shapes, check_pixels, map_levels_of
from fastmaf.inspection.model_card import combined_card
from fastmaf.inspection.model_parts import read_parts, tensors_of_parts
from fastmaf.inspection.model_schema import ABOUT, KEY
from fastmaf.io.safe_json import parse
from fastmaf.io.schema import ListOf, Number, OneOf, Record, Text, Whole
from fastmaf.io.tensor_file import TensorFile, write_tensors

KIND = "combined"
_SCORES = "calibration_scores"
_SCALE = Number(low=1e-30, high=1e30)
_PART = Record({"name": Text(), "mean": Number(), "deviation": _SCALE, "map_unit": _SCALE})
_RECORD = Record(
    {
        "kind": OneOf((KIND,)),
        "size": Whole(1, 2**15),
        "parts": ListOf(_PART, shortest=1, longest=16),
        "calibration": CALIBRATION,
        "about": ABOUT,
    }
)


@dataclass(frozen=True)
class Standard:
    """How the results of a part enter a combination.

    Attributes:
        name: of the part, for the report, such as ``"64 pixels"``.
        mean, deviation: of its scores of good images that it has not seen.
        map_unit: what its anomaly maps are divided by.
    """

    name: str
    mean: float
    deviation: float
    map_unit: float


class Combination(NamedTuple):
    """How several models are combined, and what their combination gives for held-out images."""

    standards: tuple[Standard, ...]
    held_out: HeldOut


@dataclass(frozen=True, eq=False)
class CombinedModel:
    """Several models of the same images as one.

    With the score s_i and the anomaly map A_i of part i, m_i and d_i the mean and the standard deviation of its scores
    of held-out good images, and u_i the unit of its maps::

        score = Σ_i (s_i − m_i) / d_i,    map = Σ_i A_i / u_i

    The units are such that every part has the same share in the mean square of the map, which is 1 over held-out good
    images. The NLL is that of the first part. Parts of a smaller size see the images reduced by ``reduced``, and their
    maps are enlarged bilinearly.

    Attributes:
        parts: the models; those of their calibrations are not used.
        standards: of each part.
        size: side of the square images that it takes, at least that of each part.
        calibration: held-out scores of the combination and the threshold taken from them.
        about: details of the training, plain JSON types.

    Raises:
        ValueError: there is no part, or a part takes larger images.
    """

    parts: tuple[AnomalyModel, ...]
    standards: tuple[Standard, ...]
    size: int
    calibration: Calibration
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.standards):
            found = f"{len(self.parts)} parts and {len(self.standards)} standards"
            raise ValueError(f"a combined model needs at least one part, and a standard of each; found {found}")
        if (largest := max(part.size for part in self.parts)) > self.size:
            raise ValueError(f"size must be at least that of each part, {largest}; found {self.size}")

    @property
    def device(self) -> torch.device:
        """The device that the first part computes on."""
        return self.parts[0].device

    @property
    def map_levels(self) -> tuple[float, float]:
        """Range of an overlay's colours: the 99th percentile and the maximum of the anomaly maps of good images."""
        return map_levels_of(self.about)

    @fastmaf.torch_defaults()
    def predict(self, pixels: Tensor, shapes: Shapes | None = None, *, nll: bool = True) -> Prediction:
        """Returns scores, anomaly maps and NLLs of images, uint8 ``[n, 3, size, size]``; ``shapes`` go to the parts.

        Without ``nll``, these may be NaN.

        Raises:
            ValueError: the images have another size or type.
        """
        predictions = self.predictions(pixels, shapes, nll=nll)
        scores = sum((p.scores - s.mean) / s.deviation for p, s in zip(predictions, self.standards, strict=True))
        maps = _combined_maps([p.anomaly_maps for p in predictions], self.standards, self.size)
        return Prediction(np.asarray(scores), maps, predictions[0].nll)

    def predictions(self, pixels: Tensor, shapes: Shapes | None = None, *, nll: bool = True) -> list[Prediction]:
        """Returns the prediction of each part for images, uint8 ``[n, 3, size, size]``; errors as ``predict``."""
        check_pixels(pixels, self.size)
        return [part.predict(reduced(pixels, part.size), shapes, nll=nll) for part in self.parts]

    def with_calibration(self, calibration: Calibration) -> CombinedModel:
        """Returns the same model with another calibration."""
        return replace(self, calibration=calibration)

    @fastmaf.torch_defaults()
    def save(self, path: str | Path, *, card: str | Path | None = None) -> None:
        """Writes the model to one safetensors file, and its model card to ``card``; see ``fastmaf.Flow.save``.

        A crash leaves the old file or the new one.
        """
        names, filled = [standard.name for standard in self.standards], None
        if card is not None:
            filled = combined_card(card, self.size, self.calibration, self.about, names)
            filled.check(path)
        record = {
            "kind": KIND,
            "size": self.size,
            "parts": [asdict(standard) for standard in self.standards],
            "calibration": self.calibration.to_json(),
            "about": self.about,
        }
        tensors, metadata = tensors_of_parts(self.parts, Path(path).resolve().parent)
        tensors[_SCORES] = torch.from_numpy(np.array(self.calibration.scores))
        write_tensors(tensors, path, {KEY: json.dumps(record), **metadata})
        if filled is not None:
            filled.write(None, {}, Path(path))


def read_model(file: TensorFile, *, device: str = "cpu") -> CombinedModel:
    """Reads what ``CombinedModel.save`` wrote from an open file; see ``load_inspection``."""
    try:
        record = parse(file.metadata[KEY], KEY)
        _RECORD.check(record, KEY)
        scores = file.tensors.get(_SCORES)
        if scores is None or scores.dtype != torch.float64:
            found = "nothing" if scores is None else scores.dtype
            raise ValueError(f"tensor {_SCORES}: expected torch.float64; found {found}")
        calibration = Calibration.from_json(record["calibration"], file.read(_SCORES).numpy())
        parts = read_parts(file, len(record["parts"]), KIND, device=device)
        standards = tuple(Standard(**entry) for entry in record["parts"])
        return CombinedModel(parts, standards, record["size"], calibration, record["about"])
    except fastmaf.CheckpointError:
        raise
    except ValueError as error:
        raise fastmaf.CheckpointError(f"{file.path}: {error}") from error


def combine(names: Sequence[str], held_out: Sequence[HeldOut], size: int) -> Combination:
    """Returns how models are combined, from their scores and maps of held-out good images.

    Args:
        names: of the models.
        held_out: scores and maps of each; the first set of each are good images.
        size: side of the combination's maps.
    """
    standards = []
    for name, (scores, maps) in zip(names, held_out, strict=True):
        mean, deviation = float(scores[0].mean()), float(scores[0].std())
        rms = _rms(maps[0])
        standards.append(Standard(name, mean, deviation if deviation > 0 else 1.0, len(names) * rms))
    together = [_combined_maps([maps[k] for _, maps in held_out], standards, size) for k in range(len(held_out[0][0]))]
    unit = _rms(together[0])
    total = sum((held.scores - s.mean) / s.deviation for held, s in zip(held_out, standards, strict=True))
    scaled = tuple(replace(standard, map_unit=standard.map_unit * unit) for standard in standards)
    return Combination(scaled, HeldOut(np.asarray(total), np.stack([maps / np.float32(unit) for maps in together])))


def _rms(maps: np.ndarray) -> float:
    return float(np.sqrt(np.square(maps, dtype=np.float64).mean())) or 1.0


def _combined_maps(maps: Sequence[np.ndarray], standards: Sequence[Standard], size: int) -> np.ndarray:
    """Returns the combination of the maps of each part, float32 ``[n, s_i, s_i]`` -> ``[n, size, size]``."""
    total = np.zeros((len(maps[0]), size, size), np.float32)
    for of_part, standard in zip(maps, standards, strict=True):
        total += squared(of_part, size) / np.float32(standard.map_unit)
    return total
