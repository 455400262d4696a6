"""nflows: ``MaskedAutoregressiveFlow`` as its documentation builds it, with feed-forward blocks."""

from __future__ import annotations

from typing import Any

import torch
from nflows.flows.autoregressive import MaskedAutoregressiveFlow
from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform
from torch import Tensor, nn
from torch.nn import functional

from fastmaf.bench.converted import DenseBlock, Twin
from fastmaf.bench.sides.side import Size, TorchSide

SMALLEST_SCALE = 1e-3


def blocks_and_orders(transforms: Any, features: int) -> list[tuple[Any, Tensor]]:
    """Returns the affine blocks among transforms and, for each, the dimensions of the data in its order."""
    order, found = torch.arange(features), []
    for transform in transforms:
        if hasattr(transform, "_permutation"):
            order = order[transform._permutation.cpu()]
        else:
            found.append((transform, order))
    return found


def dense_block(made: Any, order: Tensor) -> DenseBlock:
    """Takes a MADE of nflows, or of normflows, whose code was once the same: its rows are (raw scale, shift)."""
    layers = [made.initial_layer, *(block.linear for block in made.blocks), made.final_layer]
    rows = torch.arange(2 * order.numel()).view(-1, 2).flip(1).reshape(-1)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    weights[-1], biases[-1] = weights[-1][rows], biases[-1][rows]
    return DenseBlock(weights, biases, [layer.degrees for layer in layers[:-1]], order)


def some_passes(block: Any, z: Tensor, count: int) -> Tensor:
    """Does what the block's own inverse does in a loop over all dimensions, ``count`` times."""
    x = torch.zeros_like(z)
    for _ in range(count):
        x, _ = block._elementwise_inverse(z, block.autoregressive_net(x, None))
    return x


class Nflows(TorchSide):
    """nflows with torch's Adam, as in its examples."""

    model: Any

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        if len(set(size.hidden)) != 1:
            raise ValueError(f"nflows takes hidden layers of one width; found {size.hidden}")
        torch.manual_seed(seed)
        # Feed-forward blocks: its default, residual ones of two layers each, is another function.
        self.model = MaskedAutoregressiveFlow(
            size.features, size.hidden[0], size.blocks, len(size.hidden) - 1, use_residual_blocks=False
        ).to(device)

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        found: Tensor = self.model._transform.inverse(z)[0]
        return found

    @torch.no_grad()
    def passes(self, z: Tensor, count: int) -> Tensor:
        return some_passes(self._blocks()[-1][0], z, count)

    def _blocks(self) -> list[tuple[MaskedAffineAutoregressiveTransform, Tensor]]:
        return blocks_and_orders(self.model._transform._transforms, self.size.features)

    def twin(self) -> nn.Module:
        blocks = [dense_block(block.autoregressive_net, order) for block, order in self._blocks()]
        return Twin(blocks, lambda raw: torch.log(functional.softplus(raw) + SMALLEST_SCALE)).to(self.device)
