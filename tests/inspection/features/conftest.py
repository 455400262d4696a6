"""A small random network of each kind, images, and what was fitted to their features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastmaf.images.dataset import load_train
from fastmaf.inspection.features.candidate import FeatureCandidate, fit_features
from fastmaf.inspection.features.efficientnet_lite import NAME, Convolution, EfficientNetLite0
from fastmaf.inspection.features.extractor import Extractor
from fastmaf.inspection.synthetic_defects.draw import SyntheticDefects, draw_defects


class TwoMaps(nn.Module):
    """A module of a user's: two maps, of 3 channels at stride 2 and of 4 at stride 4, as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 4, 3, 2, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        y = self.first(x).relu()
        return y, self.second(y)


def random_network() -> EfficientNetLite0:
    """The architecture of the pretrained network with random weights."""
    network, generator = EfficientNetLite0().eval(), torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, Convolution):
            fan_in = layer.weight[0].numel()
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / fan_in**0.5)
            layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator))
    return network


@pytest.fixture(scope="package")
def pixels(data: Path) -> Tensor:
    return load_train(data, size=32, progress=False).pixels


@pytest.fixture(scope="package")
def drawn(pixels: Tensor) -> list[SyntheticDefects]:
    return [draw_defects(pixels, seed=0)]


@pytest.fixture(scope="package")
def candidate(pixels: Tensor, drawn: list[SyntheticDefects]) -> FeatureCandidate:
    """Of a network that fastmaf knows by name, so that its model can be saved."""
    return fit_features(pixels, Extractor(random_network(), NAME, 32), drawn=drawn, progress=False)
