"""Feature maps of images on one grid: from EfficientNet-Lite0, or from any torch module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from fastmaf.inspection.features import efficientnet_lite

SIZE = 256
"""Side in pixels of the square images that features are computed from."""

PRECOMPUTED = "precomputed"
"""Given instead of a network: features were computed elsewhere."""

_LARGEST_GRID = 16
_MOST_CHANNELS = 256

Maps: TypeAlias = Any
"""A tensor or array ``[n, c, h, w]``, or a sequence or mapping of such with equal n."""


@dataclass(frozen=True, eq=False)
class Extractor:
    """Computes feature maps of images, on the grid of the coarsest map.

    Attributes:
        network: takes RGB on [0, 1], float32 ``[n, 3, s, s]``, and returns ``Maps``; used in evaluation mode. None if
            features were computed elsewhere.
        name: of the network, if it is one that fastmaf can load itself; else None.
        size: s, and the side of anomaly maps.
    """

    network: nn.Module | None
    name: str | None = None
    size: int = SIZE

    @property
    def label(self) -> str:
        """For reports."""
        return self.name or (f"{PRECOMPUTED} features" if self.network is None else type(self.network).__name__)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns the features of images, uint8 ``[n, 3, size, size]``, as float32 ``[n, C, h, w]``.

        Images are processed one by one: results do not depend on the other images of a batch.

        Raises:
            ValueError: the network returns something else than feature maps.
        """
        if self.network is None:
            raise ValueError("this model takes features that were computed elsewhere; found images")
        tensors = chain(self.network.parameters(), self.network.buffers())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        training = self.network.training
        self.network.eval()
        try:
            results = [on_grid(self.network(image[None].to(device) / 255)).cpu() for image in pixels]
        finally:
            self.network.train(training)
        return torch.cat(results)


def extractor_of(features: nn.Module | str) -> Extractor:
    """Returns an extractor from the name of a network, or from any module that returns feature maps.

    Raises:
        MissingExtraError: the weights of a named network are not installed.
        ValueError: the name is unknown.
    """
    if isinstance(features, nn.Module):
        return Extractor(features)
    check_name(features)
    return Extractor(efficientnet_lite.pretrained(), features)


def check_name(features: object) -> None:
    """Raises ValueError unless this is the name of a network that fastmaf can load itself."""
    if features != efficientnet_lite.NAME:
        raise ValueError(f"features must be {efficientnet_lite.NAME!r} or a torch module; found {features!r}")


def on_grid(maps: Maps) -> Tensor:
    """Returns feature maps on the grid of the coarsest of them, at most 16 x 16, as one float32 ``[n, C, h, w]``.

    Finer maps are averaged over the cells of the grid. Of more than 256 channels, a random selection is kept, which is
    the same every time.

    Raises:
        ValueError: ``maps`` is something else, or not finite.
    """
    expected = "features must be maps [n, c, h, w], one or several of as many images"
    if isinstance(maps, Mapping):
        maps = list(maps.values())
    parts = [maps] if isinstance(maps, (Tensor, np.ndarray)) else maps
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        raise ValueError(f"{expected}; found {type(maps).__name__}")
    tensors = [part.detach() if isinstance(part, Tensor) else torch.from_numpy(np.array(part, float)) for part in parts]
    shapes = ", ".join(f"{list(tensor.shape)}" for tensor in tensors) or "none"
    if not tensors or any(tensor.ndim != 4 or not tensor.numel() or tensor.is_complex() for tensor in tensors):
        raise ValueError(f"{expected}; found {shapes}")
    if len({len(tensor) for tensor in tensors}) > 1:
        raise ValueError(f"{expected}; found {shapes}")
    height, width = (min(_LARGEST_GRID, *(tensor.shape[axis] for tensor in tensors)) for axis in (2, 3))
    joined = torch.cat([adaptive_avg_pool2d(tensor.float(), (height, width)) for tensor in tensors], dim=1)
    if not bool(joined.isfinite().all()):
        raise ValueError("features must be finite; found NaN or infinity")
    return joined[:, channels_kept(joined.shape[1])] if joined.shape[1] > _MOST_CHANNELS else joined


def channels_kept(channels: int) -> Tensor:
    """Returns the indices of the channels that are kept."""
    chosen = np.random.default_rng(0).permutation(channels)[:_MOST_CHANNELS]
    return torch.from_numpy(np.sort(chosen))
