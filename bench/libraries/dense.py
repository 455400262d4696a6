"""The same function with dense weights: as libraries usually compute it (naive), and optimised by hand (dense)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmaf.bench.libraries.base import LEARNING_RATE, TorchLibrary
from fastmaf.bench.libraries.converted import ConvertedFlow, DenseBlock
from fastmaf.degrees import hidden_degrees, input_degrees
from fastmaf.naive import NaiveMADE, NaiveMAF


class MaskedOnce(NaiveMADE):
    """A naive block whose masks are applied to the weights in advance instead of on every pass."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for name, mask in list(self.named_buffers()):
            self.register_buffer(name, mask.bool(), persistent=False)  # a byte each
        self.apply_masks()

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Sets masked weights to zero, which an optimiser may have changed."""
        for weight, mask in zip(self.weights, self.buffers(), strict=True):
            weight.masked_fill_(~mask, 0.0)

    def _parameters_of(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = functional.linear(x if k == 0 else torch.relu(x), weight, bias)
        shift, log_scale = x.chunk(2, dim=1)
        return shift, log_scale.clamp(-self.log_scale_bound, self.log_scale_bound)


class Naive(TorchLibrary):
    """The naive model, which computes mask × weight on every pass, with torch's default Adam."""

    block: ClassVar[type[NaiveMADE]] = NaiveMADE
    compiled: ClassVar[bool] = False

    def build(self) -> NaiveMAF:
        """Returns blocks with fastmaf's default degrees, in natural order."""
        features, hidden, blocks, levels = self.size
        self.degrees = hidden_degrees("spread", features, hidden, levels=levels)
        model = NaiveMAF([self._block() for _ in range(blocks)], [torch.arange(features)] * blocks)
        if self.compiled:
            model.log_prob = torch.compile(model.log_prob, dynamic=False)  # type: ignore[method-assign]
        return model

    def _block(self) -> NaiveMADE:
        features, hidden = self.size[:2]
        layers = [nn.Linear(*pair) for pair in pairwise((features, *hidden, 2 * features))]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return self.block(input_degrees(features), self.degrees, weights, biases)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return self.model.inverse(torch.randn(n, self.size.features, device=self.device))[0]

    @torch.no_grad()
    def inverse(self, z: Tensor, passes: int) -> Tensor:
        block, x = self.model.blocks[-1], torch.zeros_like(z)
        for d in range(passes):  # as NaiveMADE.inverse, without its last pass for the log-determinant
            shift, log_scale = block._parameters_of(x)
            x[:, d] = z[:, d] * torch.exp(log_scale[:, d]) + shift[:, d]
        return x

    def counterpart(self) -> nn.Module:
        order = torch.arange(self.size.features)
        # From all shifts, then all log-scales, to a shift and a log-scale per dimension.
        rows = torch.arange(2 * len(order)).view(2, -1).T.reshape(-1)
        blocks = []
        for block in self.model.blocks:
            weights, biases = list(block.weights), list(block.biases)
            weights[-1], biases[-1] = weights[-1][rows], biases[-1][rows]
            blocks.append(DenseBlock(weights, biases, self.degrees, order))
        return ConvertedFlow(blocks).to(self.device)


class NaiveCompiled(Naive):
    """The naive model with torch.compile."""

    compiled = True


class Dense(Naive):
    """Optimised by hand: weights masked once and again after each step, and torch's fused Adam."""

    block = MaskedOnce

    def new_optimizer(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def train_step(self, x: Tensor) -> None:
        super().train_step(x)
        for block in self.model.blocks:
            block.apply_masks()


class DenseCompiled(Dense):
    """The dense model with torch.compile."""

    compiled = True
