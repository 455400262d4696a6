"""An inspection model of features: a network, a Gaussian of its features, and the scores of good images."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.features.extractor import Extractor
from fastmaf.inspection.features.gaussian import LocationGaussian
from fastmaf.inspection.features.maps import DistanceStatistics, anomaly_maps, image_scores
from fastmaf.inspection.model import Prediction, Shapes, check_pixels, map_levels_of
from fastmaf.inspection.model_card import features_card
from fastmaf.inspection.model_schema import KEY
from fastmaf.io.atomic import staging
from fastmaf.io.tensor_file import read_tensors, write_tensors

KIND = "features"
FLOW = "flow/"
"""Prefix of the flow's tensors and metadata in a file."""


@dataclass(frozen=True, eq=False)
class FeatureModel:
    """A Gaussian of the features of images at each location of a grid.

    With d_l the Mahalanobis distance of the features of location l, or their NLL where a MAF follows the Gaussian, and
    m_l and s_l its mean and standard deviation over held-out good images::

        score = mean of the largest (d_l − m_l) / s_l,    map = d_l − m_l, enlarged and smoothed

    The NLL is that of the features, summed over the locations; locations overlap in what they see, so it is no density
    of the image.

    Attributes:
        extractor: from images to features.
        gaussian: of the features.
        grid: rows and columns of locations.
        statistics: of the distances of good images that the Gaussian has not seen.
        map_unit: what anomaly maps are divided by, so that their mean square is 1 over these images.
        calibration: scores of such images and the threshold taken from them.
        about: details of the training, plain JSON types.
    """

    extractor: Extractor
    gaussian: LocationGaussian
    grid: tuple[int, int]
    statistics: DistanceStatistics
    map_unit: float
    calibration: Calibration
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.extractor.size

    @property
    def device(self) -> torch.device:
        """The device of the Gaussian; the network may be on another."""
        return self.gaussian.mean.device

    @property
    def map_levels(self) -> tuple[float, float]:
        """Range of an overlay's colours: the 99th percentile and the maximum of the anomaly maps of good images."""
        return map_levels_of(self.about)

    @fastmaf.torch_defaults()
    def predict(self, pixels: Tensor, shapes: Shapes | None = None, *, nll: bool = True) -> Prediction:
        """Returns scores, anomaly maps and NLLs of images, uint8 ``[n, 3, size, size]``; ``shapes`` are not used.

        Results do not depend on the batch that an image is in. The NLLs are a by-product, with ``nll`` or without.

        Raises:
            ValueError: the images have another size or type.
        """
        check_pixels(pixels, self.size)
        empty = torch.empty(0, self.gaussian.mean.shape[1], *self.grid)
        return self.predict_features(torch.cat([empty, *(self.extractor(image[None]) for image in pixels)]))

    @fastmaf.torch_defaults()
    def predict_features(self, features: Tensor) -> Prediction:
        """Returns scores, anomaly maps and NLLs of features, float32 ``[n, C, h, w]`` on the model's grid.

        Raises:
            ValueError: the features have another shape.
        """
        expected = (self.gaussian.mean.shape[1], *self.grid)
        if features.shape[1:] != expected:
            raise ValueError(
                f"features must be [n, {expected[0]}, {expected[1]}, {expected[2]}] on their grid; "
                f"found {list(features.shape)}"
            )
        x = features.flatten(2).to(self.device)
        rows = [self.gaussian.distances(x[i : i + 1]) for i in range(len(x))]  # one by one, as the features
        distances = torch.cat([x.new_empty(0, x.shape[2]), *rows])
        maps = anomaly_maps(distances, self.statistics, self.grid, self.size, self.map_unit)
        scores = image_scores(distances, self.statistics)
        return Prediction(*(values.cpu().numpy() for values in (scores, maps, self.gaussian.nll(distances))))

    def with_calibration(self, calibration: Calibration) -> FeatureModel:
        """Returns the same model with another calibration."""
        return replace(self, calibration=calibration)

    @fastmaf.torch_defaults()
    def save(self, path: str | Path, *, card: str | Path | None = None) -> None:
        """Writes the model to one safetensors file, and its model card to ``card``; see ``fastmaf.Flow.save``.

        The file holds the weights of a network that fastmaf knows by name, so that it can be loaded without the package
        that brought them.

        Raises:
            ValueError: the features are of a module or an array of the user's, which a file cannot hold.
        """
        network = self.extractor.network
        if self.extractor.name is None or network is None:
            raise ValueError(
                f"features of {self.extractor.label} cannot be saved: expected those of a network that is known by "
                "name, such as 'efficientnet-lite0'"
            )
        filled = None
        if card is not None:
            filled = features_card(card, self.size, self.calibration, self.about, self.extractor.name)
            filled.check(path)
        record = {
            "kind": KIND,
            "features": self.extractor.name,
            "size": self.size,
            "grid": list(self.grid),
            "map_unit": self.map_unit,
            "calibration": self.calibration.to_json(),
            "about": self.about,
        }
        metadata = {KEY: json.dumps(record)}
        tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
        tensors |= {
            "mean": self.gaussian.mean,
            "factor": _packed(self.gaussian.factor),
            "distance_mean": self.statistics.mean,
            "distance_deviation": self.statistics.deviation,
            "calibration_scores": torch.from_numpy(np.array(self.calibration.scores)),
        }
        if self.gaussian.flow is not None:
            with staging(Path(path).resolve().parent) as folder:
                self.gaussian.flow.save(folder / "flow.safetensors")
                of_flow, texts = read_tensors(folder / "flow.safetensors")
            tensors |= {f"{FLOW}{name}": tensor for name, tensor in of_flow.items()}
            metadata |= {f"{FLOW}{key}": text for key, text in texts.items()}
        write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        if filled is not None:
            filled.write(None, {}, Path(path))


def _packed(factor: Tensor) -> Tensor:
    """Returns the lower triangles of matrices ``[P, C, C]``, ``[P, C (C + 1) / 2]``."""
    rows, columns = torch.tril_indices(*factor.shape[1:]).to(factor.device)
    return factor[:, rows, columns]


def unpacked(packed: Tensor, channels: int) -> Tensor:
    """Returns the lower triangular matrices ``[P, C, C]`` of ``_packed``."""
    factor = packed.new_zeros(len(packed), channels, channels)
    rows, columns = torch.tril_indices(channels, channels)
    factor[:, rows, columns] = packed
    return factor
