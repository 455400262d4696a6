"""zuko: ``zuko.flows.MAF`` as its documentation builds it."""

from __future__ import annotations

import math

import torch
import zuko
from torch import Tensor, nn

from fastmaf.bench.libraries.base import TorchLibrary
from fastmaf.bench.libraries.converted import ConvertedFlow, DenseBlock, degrees_of_masks

SMALLEST_SCALE = 1e-3


class Zuko(TorchLibrary):
    """zuko with torch's Adam, as in its tutorials."""

    def build(self) -> nn.Module:
        features, hidden, blocks, _ = self.size
        return zuko.flows.MAF(features, transforms=blocks, hidden_features=hidden)

    def density(self, x: Tensor) -> Tensor:
        return self.model().log_prob(x)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return self.model().sample((n,))

    @torch.no_grad()
    def inverse(self, z: Tensor, passes: int) -> Tensor:
        block = self.model.transform.transforms[-1]
        all_passes, block.passes = block.passes, passes
        try:
            return block().inv(z[:, block.order])[:, block.order.argsort()]
        finally:
            block.passes = all_passes

    def counterpart(self) -> nn.Module:
        blocks = []
        for block in self.model.transform.transforms:
            order = block.order.argsort()
            layers = [layer for layer in block.hyper if hasattr(layer, "mask")]
            masks = [layer.mask for layer in layers]
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
            weights[0], masks[0] = weights[0][:, order], masks[0][:, order]
            rows = torch.stack((2 * order, 2 * order + 1), 1).reshape(-1)
            weights[-1], biases[-1] = weights[-1][rows], biases[-1][rows]
            degrees = degrees_of_masks(masks[:-1], masks[-1][2 * order])
            blocks.append(DenseBlock(weights, biases, degrees, order.cpu()))
        bound = abs(math.log(SMALLEST_SCALE))
        return ConvertedFlow(blocks, lambda raw: raw / (1 + (raw / bound).abs())).to(self.device)
