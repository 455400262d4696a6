"""zuko: ``zuko.flows.MAF`` as its documentation builds it."""

from __future__ import annotations

import math
from typing import Any

import torch
import zuko
from torch import Tensor, nn

from fastmaf.bench.converted import DenseBlock, Twin, degrees_of_masks
from fastmaf.bench.sides.side import Size, TorchSide

SMALLEST_SCALE = 1e-3


class Zuko(TorchSide):
    """zuko with torch's Adam, as in its tutorials."""

    model: Any

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        torch.manual_seed(seed)
        self.model = zuko.flows.MAF(size.features, transforms=size.blocks, hidden_features=size.hidden).to(device)

    def loss(self, x: Tensor) -> Tensor:
        loss: Tensor = -self.model().log_prob(x).mean()
        return loss

    def log_prob(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.model().log_prob(x)
        return found

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        found: Tensor = self.model().sample((n,))
        return found

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        order = self._order(-1)
        found: Tensor = self.model().transform.inv(z[:, order.argsort()])
        return found

    @torch.no_grad()
    def passes(self, z: Tensor, count: int) -> Tensor:
        order, block = self._order(-1), self.model.transform.transforms[-1]
        whole, block.passes = block.passes, count
        try:
            x: Tensor = block().inv(z[:, order.argsort()])
        finally:
            block.passes = whole
        return x[:, order]

    def _order(self, block: int) -> Tensor:
        rank: Tensor = self.model.transform.transforms[block].order
        return rank.argsort()

    def twin(self) -> nn.Module:
        blocks = []
        for i, block in enumerate(self.model.transform.transforms):
            order = self._order(i)
            layers = [layer for layer in block.hyper if hasattr(layer, "mask")]
            masks = [layer.mask for layer in layers]
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
            weights[0], masks[0] = weights[0][:, order], masks[0][:, order]
            rows = torch.stack((2 * order, 2 * order + 1), 1).reshape(-1)
            weights[-1], biases[-1] = weights[-1][rows], biases[-1][rows]
            blocks.append(DenseBlock(weights, biases, degrees_of_masks(masks[:-1], masks[-1][2 * order]), order.cpu()))
        bound = abs(math.log(SMALLEST_SCALE))
        return Twin(blocks, lambda raw: raw / (1 + (raw / bound).abs())).to(self.device)
