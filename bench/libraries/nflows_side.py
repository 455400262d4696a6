"""nflows: ``MaskedAutoregressiveFlow`` as its documentation builds it, with feed-forward blocks."""

from __future__ import annotations

from typing import Any

import torch
from nflows.flows.autoregressive import MaskedAutoregressiveFlow
from torch import Tensor, nn
from torch.nn import functional

from fastmaf.bench.libraries.base import TorchLibrary
from fastmaf.bench.libraries.converted import ConvertedFlow, DenseBlock

SMALLEST_SCALE = 1e-3


def dense_block(made: Any, order: Tensor) -> DenseBlock:
    """Returns a MADE of nflows, or of normflows, whose code is derived from it: its rows are (raw scale, shift)."""
    layers = [made.initial_layer, *(block.linear for block in made.blocks), made.final_layer]
    rows = torch.arange(2 * order.numel()).view(-1, 2).flip(1).reshape(-1)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    weights[-1], biases[-1] = weights[-1][rows], biases[-1][rows]
    return DenseBlock(weights, biases, [layer.degrees for layer in layers[:-1]], order)


def invert(block: Any, z: Tensor, passes: int) -> Tensor:
    """Does some of the passes of the block's own inverse, a loop over all dimensions."""
    x = torch.zeros_like(z)
    for _ in range(passes):
        x, _ = block._elementwise_inverse(z, block.autoregressive_net(x, None))
    return x


class Nflows(TorchLibrary):
    """nflows with torch's Adam, as in its examples."""

    def build(self) -> nn.Module:
        # Feed-forward blocks: its default, residual blocks of two layers each, is another function.
        features, hidden, blocks, _ = self.size
        width = self.size.one_width("nflows")
        return MaskedAutoregressiveFlow(features, width, blocks, len(hidden) - 1, use_residual_blocks=False)

    @torch.no_grad()
    def inverse(self, z: Tensor, passes: int) -> Tensor:
        return invert(self.model._transform._transforms[-1], z, passes)

    def counterpart(self) -> nn.Module:
        order, blocks = torch.arange(self.size.features), []
        for transform in self.model._transform._transforms:
            if hasattr(transform, "_permutation"):
                order = order[transform._permutation.cpu()]
            else:
                blocks.append(dense_block(transform.autoregressive_net, order))
        return ConvertedFlow(blocks, lambda raw: torch.log(functional.softplus(raw) + SMALLEST_SCALE)).to(self.device)
