"""The inspection model of a texture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.model import Prediction, Shapes, check_pixels, map_levels_of
from fastmaf.inspection.model_card import texture_card
from fastmaf.inspection.model_schema import KEY
from fastmaf.inspection.scoring.float64_flow import rounded
from fastmaf.inspection.texture.density import nll
from fastmaf.inspection.texture.features import LEVELS, LONGEST, TextureFilters, to_texture
from fastmaf.inspection.texture.position import PositionStatistics
from fastmaf.inspection.texture.scoring import anomaly_map, image_scores, relative_maps, score_parts
from fastmaf.io.atomic import staging
from fastmaf.io.tensor_file import read_tensors, write_tensors

KIND = "texture"


@dataclass(frozen=True, eq=False)
class TextureModel:
    """A density of local features that is the same at every position of an image, at several scales.

    With f_l(p) the features at location p of level l, c(p) the light of the image and the position, and p_l(f | c) the
    density of level l, the map of a level is standardised by the mean μ_l and the deviation σ_l of good images at that
    position::

        A_l(p) = (−log p_l(f_l(p) | c(p)) − μ_l(p)) / σ_l(p)

    The score is the mean over the levels of the highest 0.5% of A_l minus its median, standardised over held-out good
    images. The NLL is the mean over the locations of a level, summed over the levels.

    Images are square, as for other models. ``shapes`` tells what they were before, so that the texture is seen at its
    own scale and aspect ratio. In images of more than 512 pixels, the highest 0.5% are those of overlapping windows of
    512 pixels, of which the largest mean counts.

    Attributes:
        size: side of the square images that it takes.
        filters: of the features.
        flows: the density of each level.
        positions: statistics of the NLL map of each level over held-out good images.
        mean, deviation: of the parts of a score over held-out good images, float64.
        map_unit: root mean square of the anomaly maps of held-out good images.
        calibration: held-out scores and the threshold taken from them.
        about: details of the training, plain JSON types.
        longest: side in pixels that larger images are reduced to.

    References:
        Papamakarios, Pavlakou and Murray 2017, Masked Autoregressive Flow for Density Estimation.
    """

    size: int
    filters: TextureFilters
    flows: tuple[fastmaf.Flow, ...]
    positions: tuple[PositionStatistics, ...]
    mean: np.ndarray
    deviation: np.ndarray
    map_unit: float
    calibration: Calibration
    about: dict[str, Any] = field(default_factory=dict)
    longest: int = LONGEST

    @property
    def map_size(self) -> int:
        """Side of the square anomaly maps: they are smooth."""
        return map_size_for(self.size)

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.filters.weight.device

    @property
    def map_levels(self) -> tuple[float, float]:
        """Range of an overlay's colours: the 99th percentile and the maximum of the anomaly maps of good images."""
        return map_levels_of(self.about)

    @fastmaf.torch_defaults()
    def predict(self, pixels: Tensor, shapes: Shapes | None = None, *, nll: bool = True) -> Prediction:
        """Returns scores, anomaly maps of ``map_size`` and NLLs of images, uint8 ``[n, 3, size, size]``.

        Each image is evaluated by itself, so that its score does not depend on the others.

        Args:
            pixels: the images.
            shapes: (height, width) of each before it became square; None: all were square.
            nll: not used: the NLLs are a by-product.

        Raises:
            ValueError: the images have another size or type, or there is another number of shapes.
        """
        check_pixels(pixels, self.size)
        if shapes is not None and len(shapes) != len(pixels):
            raise ValueError(f"shapes must hold that of each of {len(pixels)} images; found {len(shapes)}")
        n = len(pixels)
        parts = np.empty((n, LEVELS))
        maps, values = np.empty((n, self.map_size, self.map_size), np.float32), np.empty(n)
        for i, image in enumerate(pixels):
            levels = nll_maps(self.filters, self.flows, image, None if shapes is None else shapes[i], self.longest)
            values[i] = sum(float(of_level.double().mean()) for of_level in levels)
            relative = relative_maps(levels, self.positions)
            parts[i] = score_parts(relative)
            maps[i] = (anomaly_map(relative, self.map_size, self.filters.border) / self.map_unit).numpy()
        scores = torch.from_numpy(image_scores(parts, self.mean, self.deviation))
        return Prediction(rounded(scores).numpy(), maps, rounded(torch.from_numpy(values)).numpy())

    def with_calibration(self, calibration: Calibration) -> TextureModel:
        """Returns the same model with another calibration."""
        return replace(self, calibration=calibration)

    @fastmaf.torch_defaults()
    def save(self, path: str | Path, *, card: str | Path | None = None) -> None:
        """Writes the model to one safetensors file, and its model card to ``card``; see ``fastmaf.Flow.save``.

        A crash leaves the old file or the new one.
        """
        filled = None if card is None else texture_card(card, self.size, self.calibration, self.about)
        if filled is not None:
            filled.check(path)
        record = {
            "kind": KIND,
            "size": self.size,
            "levels": len(self.flows),
            "light": self.filters.light is not None,
            "map_unit": self.map_unit,
            "calibration": self.calibration.to_json(),
            "about": self.about,
            **({} if self.longest == LONGEST else {"longest": self.longest}),
        }
        tensors = {
            "filter_weight": self.filters.weight,
            "filter_bias": self.filters.bias,
            "position_mean": torch.stack([position.mean for position in self.positions]),
            "position_deviation": torch.stack([position.deviation for position in self.positions]),
            "part_mean": torch.from_numpy(self.mean),
            "part_deviation": torch.from_numpy(self.deviation),
            "calibration_scores": torch.from_numpy(np.array(self.calibration.scores)),
        }
        if self.filters.light is not None:
            tensors["light"] = torch.stack([self.filters.light.mean, self.filters.light.deviation])
        metadata = {KEY: json.dumps(record)}
        with staging(Path(path).resolve().parent) as folder:
            for level, flow in enumerate(self.flows):
                flow.save(folder / f"{level}.safetensors")
                of_flow, texts = read_tensors(folder / f"{level}.safetensors")
                tensors |= {f"{level}/{name}": tensor for name, tensor in of_flow.items()}
                metadata |= {f"{level}/{key}": text for key, text in texts.items()}
        write_tensors(tensors, path, metadata)
        if filled is not None:
            filled.write(None, {}, Path(path))


def map_size_for(size: int) -> int:
    """Returns the side of the anomaly maps of images of this side."""
    return min(size, LONGEST)


@torch.no_grad()
def nll_maps(
    filters: TextureFilters,
    flows: Sequence[fastmaf.Flow],
    image: Tensor,
    shape: tuple[int, int] | None,
    longest: int = LONGEST,
) -> list[Tensor]:
    """Returns the NLL map of each level of an image, uint8 ``[3, s, s]``, float32 ``[h_l, w_l]`` in nats."""
    texture = to_texture(image, shape, filters.channels, longest).to(filters.weight.device)
    return [
        nll(flow, features.flatten(1).T.contiguous(), contexts).view(features.shape[1:])
        for flow, (features, contexts) in zip(flows, filters(texture), strict=False)
    ]
