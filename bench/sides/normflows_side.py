"""normflows: ``MaskedAffineAutoregressive`` in a ``NormalizingFlow``, turned round so that its density takes one pass.

As it comes it is an inverse autoregressive flow, whose density takes D passes; ``Reverse`` is its own means against
that.
"""

from __future__ import annotations

from typing import Any

import normflows
import torch
from torch import Tensor, nn

from fastmaf.bench.converted import Twin
from fastmaf.bench.sides.nflows_side import dense_block, some_passes
from fastmaf.bench.sides.side import Size, TorchSide

SMALLEST_SCALE = 1e-3


class Normflows(TorchSide):
    """normflows with torch's Adam, as in its examples."""

    model: Any

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        if len(set(size.hidden)) != 1:
            raise ValueError(f"normflows takes hidden layers of one width; found {size.hidden}")
        torch.manual_seed(seed)
        flows = [
            normflows.flows.Reverse(
                normflows.flows.MaskedAffineAutoregressive(
                    size.features, size.hidden[0], num_blocks=len(size.hidden) - 1, use_residual_blocks=False
                )
            )
            for _ in range(size.blocks)
        ]
        base = normflows.distributions.base.DiagGaussian(size.features, trainable=False)
        self.model = normflows.NormalizingFlow(base, flows).to(device)

    def loss(self, x: Tensor) -> Tensor:
        loss: Tensor = self.model.forward_kld(x)
        return loss

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        found: Tensor = self.model.sample(n)[0]
        return found

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        found: Tensor = self.model.forward(z)
        return found

    @torch.no_grad()
    def passes(self, z: Tensor, count: int) -> Tensor:
        # Its list runs from the base to the data.
        return some_passes(self.model.flows[0].flow, z, count)

    def twin(self) -> nn.Module:
        order = torch.arange(self.size.features)
        # Before the first of its feed-forward blocks there is no activation.
        blocks = [
            dense_block(flow.flow.autoregressive_net, order)._replace(first_activation="identity")
            for flow in reversed(self.model.flows)
        ]
        return Twin(blocks, lambda raw: torch.log(torch.sigmoid(raw + 2.0) + SMALLEST_SCALE)).to(self.device)
