"""normflows: ``MaskedAffineAutoregressive`` in a ``NormalizingFlow``, reversed so that its density takes one pass.

Unreversed it is an inverse autoregressive flow, whose density takes D passes; ``Reverse`` is the library's own way to
exchange the two directions.
"""

from __future__ import annotations

import normflows
import torch
from torch import Tensor, nn

from fastmaf.bench.libraries.base import Size, TorchLibrary
from fastmaf.bench.libraries.converted import ConvertedFlow
from fastmaf.bench.libraries.nflows_side import dense_block, some_passes

SMALLEST_SCALE = 1e-3


class Normflows(TorchLibrary):
    """normflows with torch's Adam, as in its examples."""

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        width, blocks = self.one_width(), len(size.hidden) - 1
        torch.manual_seed(seed)
        affine, reverse = normflows.flows.MaskedAffineAutoregressive, normflows.flows.Reverse
        flows = [
            reverse(affine(size.features, width, num_blocks=blocks, use_residual_blocks=False))
            for _ in range(size.blocks)
        ]
        base = normflows.distributions.base.DiagGaussian(size.features, trainable=False)
        self.model = normflows.NormalizingFlow(base, flows).to(device)

    def loss(self, x: Tensor) -> Tensor:
        return self.model.forward_kld(x)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return self.model.sample(n)[0]

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        return self.model.forward(z)

    @torch.no_grad()
    def passes(self, z: Tensor, count: int) -> Tensor:
        return some_passes(self.model.flows[0].flow, z, count)  # its list runs from the base to the data

    def counterpart(self) -> nn.Module:
        order = torch.arange(self.size.features)
        # There is no activation in front of its first feed-forward block.
        blocks = [
            dense_block(flow.flow.autoregressive_net, order)._replace(first_activation="identity")
            for flow in reversed(self.model.flows)
        ]
        return ConvertedFlow(blocks, lambda raw: torch.log(torch.sigmoid(raw + 2.0) + SMALLEST_SCALE)).to(self.device)
