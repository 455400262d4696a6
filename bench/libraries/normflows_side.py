"""normflows: ``MaskedAffineAutoregressive`` in a ``NormalizingFlow``, reversed so that its density takes one pass.

Unreversed it is an inverse autoregressive flow, whose density takes D passes; ``Reverse`` is the library's own way to
exchange the two directions.
"""

from __future__ import annotations

import normflows
import torch
from torch import Tensor, nn

from fastmaf.bench.libraries.base import TorchLibrary
from fastmaf.bench.libraries.converted import ConvertedFlow
from fastmaf.bench.libraries.nflows_side import dense_block, invert

SMALLEST_SCALE = 1e-3


class Normflows(TorchLibrary):
    """normflows with torch's Adam, as in its examples."""

    def build(self) -> nn.Module:
        features, hidden, blocks, _ = self.size
        options = {"num_blocks": len(hidden) - 1, "use_residual_blocks": False}
        affine, reverse = normflows.flows.MaskedAffineAutoregressive, normflows.flows.Reverse
        width = self.size.one_width("normflows")
        flows = [reverse(affine(features, width, **options)) for _ in range(blocks)]
        base = normflows.distributions.base.DiagGaussian(features, trainable=False)
        return normflows.NormalizingFlow(base, flows)

    def sample(self, n: int) -> Tensor:
        return super().sample(n)[0]

    @torch.no_grad()
    def inverse(self, z: Tensor, passes: int) -> Tensor:
        return invert(self.model.flows[0].flow, z, passes)  # its list runs from the base to the data

    def counterpart(self) -> nn.Module:
        order = torch.arange(self.size.features)
        # There is no activation in front of its first feed-forward block.
        blocks = [
            dense_block(flow.flow.autoregressive_net, order)._replace(first_activation="identity")
            for flow in reversed(self.model.flows)
        ]
        return ConvertedFlow(blocks, lambda raw: torch.log(torch.sigmoid(raw + 2.0) + SMALLEST_SCALE)).to(self.device)
