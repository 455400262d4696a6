"""Images that are much larger than a model: a grid of overlapping tiles, each with a model of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.calibration import CALIBRATION, Calibration
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.model import Prediction, Shapes, check_pixels, map_levels_of
from fastmaf.inspection.model_card import tiled_card
from fastmaf.inspection.model_parts import read_parts, tensors_of_parts
from fastmaf.inspection.model_schema import ABOUT, KEY
from fastmaf.inspection.tiles import stitched, tile_of, tiled_size
from fastmaf.io.safe_json import parse
from fastmaf.io.schema import OneOf, Record, Whole
from fastmaf.io.tensor_file import TensorFile, write_tensors

KIND = "tiled"
_TENSORS = ("calibration_scores", "mean", "deviation")
_RECORD = Record({"kind": OneOf((KIND,)), "tiles": Whole(1, 64), "calibration": CALIBRATION, "about": ABOUT})


@dataclass(frozen=True, eq=False)
class TiledModel:
    """A grid of models, each of one tile of an image at a fixed place.

    With the score s_i of tile i, and m_i and d_i the mean and the standard deviation of its scores of held-out good
    images::

        score = max_i (s_i − m_i) / d_i

    An image has one score, and one false-alarm rate however many tiles it has: the calibration is of the scores of
    whole images that no tile's model has seen. The map is that of the tiles; where they overlap it fades from one to
    the next. The NLL is the sum over the tiles, which is no density of the image, as overlaps count more than once.

    Attributes:
        parts: the model of each tile, row by row.
        mean, deviation: m and d, float64 ``[tiles²]``.
        calibration: held-out scores of whole images, and the threshold.
        about: details of the training, plain JSON types.

    Raises:
        ValueError: the parts are not a square number of models of the same size.
    """

    parts: tuple[AnomalyModel, ...]
    mean: np.ndarray
    deviation: np.ndarray
    calibration: Calibration
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {part.size for part in self.parts}
        if self.tiles**2 != len(self.parts) or len(sizes) != 1:
            raise ValueError(
                f"expected a square number of models of one size; found {len(self.parts)} of sizes {sorted(sizes)}"
            )
        if self.mean.shape != self.deviation.shape or self.mean.shape != (len(self.parts),):
            found = f"{list(self.mean.shape)} and {list(self.deviation.shape)}"
            raise ValueError(f"expected a mean and a deviation of each of {len(self.parts)} tiles; found {found}")

    @property
    def tiles(self) -> int:
        """Number of tiles along each side."""
        return round(len(self.parts) ** 0.5)

    @property
    def size(self) -> int:
        """Side of the square images that it takes."""
        return tiled_size(self.parts[0].size, self.tiles)

    @property
    def device(self) -> torch.device:
        """The device that the models compute on."""
        return self.parts[0].device

    @property
    def map_levels(self) -> tuple[float, float]:
        """Range of an overlay's colours: the 99th percentile and the maximum of the anomaly maps of good images."""
        return map_levels_of(self.about)

    @fastmaf.torch_defaults()
    def predict(self, pixels: Tensor, shapes: Shapes | None = None, *, nll: bool = True) -> Prediction:
        """Returns scores, anomaly maps and NLLs of images, uint8 ``[n, 3, size, size]``; ``shapes`` are not used.

        Without ``nll``, these may be NaN.

        Raises:
            ValueError: the images have another size or type.
        """
        check_pixels(pixels, self.size)
        size = self.parts[0].size
        predictions = [part.predict(tile_of(pixels, i, size), nll=nll) for i, part in enumerate(self.parts)]
        scores = np.stack([prediction.scores for prediction in predictions])
        standard = (scores - self.mean[:, None]) / self.deviation[:, None]
        maps = stitched([prediction.anomaly_maps for prediction in predictions])
        return Prediction(standard.max(axis=0), maps, np.sum([p.nll for p in predictions], axis=0))

    def with_calibration(self, calibration: Calibration) -> TiledModel:
        """Returns the same model with another calibration."""
        return replace(self, calibration=calibration)

    @fastmaf.torch_defaults()
    def save(self, path: str | Path, *, card: str | Path | None = None) -> None:
        """Writes the model to one safetensors file, and its model card to ``card``; see ``fastmaf.Flow.save``.

        A crash leaves the old file or the new one.
        """
        filled = None
        if card is not None:
            filled = tiled_card(card, self.size, self.tiles, self.calibration, self.about)
            filled.check(path)
        record = {"kind": KIND, "tiles": self.tiles, "calibration": self.calibration.to_json(), "about": self.about}
        tensors, metadata = tensors_of_parts(self.parts, Path(path).resolve().parent)
        arrays = (np.array(self.calibration.scores), self.mean, self.deviation)
        tensors |= {name: torch.from_numpy(array) for name, array in zip(_TENSORS, arrays, strict=True)}
        write_tensors(tensors, path, {KEY: json.dumps(record), **metadata})
        if filled is not None:
            filled.write(None, {}, Path(path))


def read_model(file: TensorFile, *, device: str = "cpu") -> TiledModel:
    """Reads what ``TiledModel.save`` wrote from an open file; see ``load_inspection``."""
    try:
        record = parse(file.metadata[KEY], KEY)
        _RECORD.check(record, KEY)
        for name in _TENSORS:
            if name not in file.tensors or file.tensors[name].dtype != torch.float64:
                found = file.tensors[name].dtype if name in file.tensors else "nothing"
                raise ValueError(f"tensor {name}: expected torch.float64; found {found}")
        scores, mean, deviation = (file.read(name).numpy() for name in _TENSORS)
        if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and (deviation > 0).all()):
            raise ValueError("mean, deviation: expected finite numbers, deviations above 0")
        calibration = Calibration.from_json(record["calibration"], scores)
        parts = read_parts(file, record["tiles"] ** 2, KIND, device=device)
        return TiledModel(parts, mean, deviation, calibration, record["about"])
    except fastmaf.CheckpointError:
        raise
    except ValueError as error:
        raise fastmaf.CheckpointError(f"{file.path}: {error}") from error
