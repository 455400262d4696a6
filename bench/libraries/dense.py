"""The same function with dense weights: as libraries usually compute it (naive), and optimised by hand (dense)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmaf.bench.libraries.base import LEARNING_RATE, Size, TorchLibrary
from fastmaf.bench.libraries.converted import ConvertedFlow, DenseBlock, degrees_of_masks
from fastmaf.degrees import hidden_degrees, input_degrees
from fastmaf.naive import NaiveMADE, NaiveMAF

BOUND = 5.0


class MaskedOnce(NaiveMADE):
    """A naive block whose masks are applied to the weights in advance instead of on every pass."""

    def masks(self) -> list[Tensor]:
        """Returns the mask of every layer, as booleans, which take a byte each."""
        return [self.get_buffer(f"mask_{k}") for k in range(len(self.weights))]

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Sets masked weights to zero, which an optimiser may have changed."""
        for k, (weight, mask) in enumerate(zip(self.weights, self.masks(), strict=True)):
            if mask.dtype != torch.bool:
                self.register_buffer(f"mask_{k}", mask := mask.bool(), persistent=False)
            weight.masked_fill_(~mask, 0.0)

    def _parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = functional.linear(x if k == 0 else torch.relu(x), weight, bias)
        shift, log_scale = x.chunk(2, dim=1)
        return shift, log_scale.clamp(-BOUND, BOUND)

    def inverse(self, z: Tensor, *, order: Tensor, passes: int | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``x``, and zeros for the log-determinant, which sampling does not need."""
        x = torch.zeros_like(z)
        for d in order[:passes]:
            shift, log_scale = self._parameters_of(x)
            x[:, d] = z[:, d] * torch.exp(log_scale[:, d]) + shift[:, d]
        return x, x.new_zeros(len(x))


class Naive(TorchLibrary):
    """The naive model, which computes mask × weight on every pass, with torch's default Adam."""

    block: ClassVar[type[NaiveMADE]] = NaiveMADE
    compiled: ClassVar[bool] = False
    model: NaiveMAF

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        self.model = NaiveMAF(self._blocks(), [torch.arange(size.features)] * size.blocks).to(device)
        self._density = torch.compile(self.model.log_prob, dynamic=False) if self.compiled else self.model.log_prob

    def _blocks(self) -> Iterator[NaiveMADE]:
        """Draws blocks with fastmaf's default degrees, in natural order."""
        size, generator = self.size, torch.Generator().manual_seed(self.seed)
        degrees = hidden_degrees("spread", size.features, size.hidden, levels=size.levels)
        widths = (size.features, *size.hidden, 2 * size.features)
        for _ in range(size.blocks):
            weights, biases = [], []
            for inputs, outputs in zip(widths, widths[1:], strict=False):
                bound = 1 / math.sqrt(inputs)
                weights.append(torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator))
                biases.append(torch.empty(outputs).uniform_(-bound, bound, generator=generator))
            yield self.block(input_degrees(size.features), degrees, weights, biases, log_scale_bound=BOUND)

    def density(self, x: Tensor) -> Tensor:
        return self._density(x)

    def sample(self, n: int) -> Tensor:
        return self.inverse(torch.randn(n, self.size.features, device=self.device))

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        return self.model.inverse(z)[0]

    @torch.no_grad()
    def passes(self, z: Tensor, count: int) -> Tensor:
        block, x = self.model.blocks[-1], torch.zeros_like(z)
        assert isinstance(block, NaiveMADE)
        for d in range(count):  # as NaiveMADE.inverse, without its last pass for the log-determinant
            shift, log_scale = block._parameters_of(x)
            x = x.clone()
            x[:, d] = z[:, d] * torch.exp(log_scale[:, d]) + shift[:, d]
        return x

    def counterpart(self) -> nn.Module:
        order, blocks = torch.arange(self.size.features), []
        # From all shifts, then all log-scales, to a shift and a log-scale per dimension.
        rows = torch.arange(2 * len(order)).view(2, -1).T.reshape(-1)
        for block in self.model.blocks:
            assert isinstance(block, NaiveMADE)
            weights, biases = list(block.weights), list(block.biases)
            masks = [block.get_buffer(f"mask_{k}") for k in range(len(weights))]
            weights[-1], biases[-1] = weights[-1][rows], biases[-1][rows]
            degrees = degrees_of_masks(masks[:-1], masks[-1][: len(order)])
            blocks.append(DenseBlock(weights, biases, degrees, order))
        return ConvertedFlow(blocks, bound=BOUND).to(self.device)


class NaiveCompiled(Naive):
    """The naive model with torch.compile."""

    compiled = True


class Dense(Naive):
    """Optimised by hand: weights masked once and again after each step, and torch's fused Adam."""

    block = MaskedOnce

    def _blocks(self) -> Iterator[NaiveMADE]:
        for block in super()._blocks():
            assert isinstance(block, MaskedOnce)
            block.apply_masks()
            yield block

    def new_optimizer(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def train_step(self, x: Tensor) -> None:
        super().train_step(x)
        for block in self.model.blocks:
            assert isinstance(block, MaskedOnce)
            block.apply_masks()

    @torch.no_grad()
    def passes(self, z: Tensor, count: int) -> Tensor:
        block = self.model.blocks[-1]
        assert isinstance(block, MaskedOnce)
        return block.inverse(z, order=self.model.orders[-1], passes=count)[0]


class DenseCompiled(Dense):
    """The dense model with torch.compile."""

    compiled = True
