"""The same function with dense weights: as libraries run it (naive), and as a clever user would (dense)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmaf.bench.converted import DenseBlock, Twin, degrees_of_masks
from fastmaf.bench.sides.side import LEARNING_RATE, Size, TorchSide
from fastmaf.degrees import hidden_degrees, input_degrees
from fastmaf.naive import NaiveMADE, NaiveMAF

BOUND = 5.0


class Naive(TorchSide):
    """The naive model, mask × weight on every pass, with torch's default Adam."""

    model: Any

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        self.model = NaiveMAF(_naive_blocks(size, seed), [torch.arange(size.features)] * size.blocks)
        self.model.to(device)
        self._log_prob = self.model.log_prob

    def loss(self, x: Tensor) -> Tensor:
        loss: Tensor = -self._log_prob(x).mean()
        return loss

    def log_prob(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self._log_prob(x)
        return found

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return self.inverse(torch.randn(n, self.size.features, device=self.device))

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        found: Tensor = self.model.inverse(z)[0]
        return found

    @torch.no_grad()
    def passes(self, z: Tensor, count: int) -> Tensor:
        block: NaiveMADE = self.model.blocks[-1]
        x = torch.zeros_like(z)
        for d in self.model.orders[-1][:count]:  # as NaiveMADE.inverse, without its last pass for the log-determinant
            shift, log_scale = block._parameters_of(x)
            x = x.clone()
            x[:, d] = z[:, d] * torch.exp(log_scale[:, d]) + shift[:, d]
        return x

    def twin(self) -> nn.Module:
        blocks = [
            # What a mask hides is no weight of this model.
            _dense_block(
                list(block.weights),
                list(block.biases),
                [block.get_buffer(f"mask_{k}") for k in range(len(block.weights))],
            )
            for block in self.model.blocks
        ]
        return Twin(blocks, bound=BOUND).to(self.device)


class NaiveCompiled(Naive):
    """The naive model through torch.compile."""

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        self._log_prob = torch.compile(self.model.log_prob, dynamic=False)


class NaiveKept(Naive):
    """The naive model in a process whose allocator keeps what is freed, so that no pass takes new pages."""


class MaskedOnce(nn.Module):
    """The naive model's function with the masks applied to the weights beforehand, not on every pass."""

    def __init__(self, blocks: Iterable[NaiveMADE], device: str) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.hidden: list[Tensor] = []  # where the masks hide a weight: a byte each
        for block in blocks:
            self.depth = len(block.weights)
            for k, (weight, bias) in enumerate(zip(block.weights, block.biases, strict=True)):
                mask = block.get_buffer(f"mask_{k}").to(device)
                self.weights.append(nn.Parameter(weight.detach().to(device) * mask))
                self.biases.append(nn.Parameter(bias.detach().to(device)))
                self.hidden.append(mask == 0)

    def block(self, first: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns shift and log-scale of the block whose first layer is ``first``."""
        for k in range(first, first + self.depth):
            x = functional.linear(x, self.weights[k], self.biases[k])
            if k < first + self.depth - 1:
                x = torch.relu(x)
        shift, raw = x.chunk(2, dim=1)
        return shift, raw.clamp(-BOUND, BOUND)

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-density ``[N]`` in nats."""
        ladj = x.new_zeros(x.shape[0])
        for first in range(0, len(self.weights), self.depth):
            shift, log_scale = self.block(first, x)
            x = (x - shift) * torch.exp(-log_scale)
            ladj = ladj - log_scale.sum(dim=1)
        return ladj - 0.5 * x.square().sum(dim=1) - 0.5 * x.shape[1] * math.log(2 * math.pi)

    def inverse(self, z: Tensor, firsts: list[int], passes: int) -> Tensor:
        """Inverts the blocks whose first layers are given, from the base on, with so many passes each."""
        for first in firsts:
            x = torch.zeros_like(z)
            for d in range(passes):
                shift, log_scale = self.block(first, x)
                x[:, d] = z[:, d] * torch.exp(log_scale[:, d]) + shift[:, d]
            z = x
        return z

    @torch.no_grad()
    def mask_again(self) -> None:
        """Takes back what the optimiser did to hidden weights."""
        for weight, hidden in zip(self.weights, self.hidden, strict=True):
            weight.masked_fill_(hidden, 0.0)


class Dense(TorchSide):
    """The clever user: weights masked once and again after each step, torch's fused Adam."""

    model: MaskedOnce

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        self.model = MaskedOnce(_naive_blocks(size, seed), device)
        self._log_prob = self.model.log_prob

    def loss(self, x: Tensor) -> Tensor:
        return -self._log_prob(x).mean()

    def log_prob(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._log_prob(x)

    def new_optimizer(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def train_step(self, x: Tensor) -> None:
        super().train_step(x)
        self.model.mask_again()

    def _firsts(self) -> list[int]:
        return list(range(0, len(self.model.weights), self.model.depth))[::-1]

    def sample(self, n: int) -> Tensor:
        return self.inverse(torch.randn(n, self.size.features, device=self.device))

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        return self.model.inverse(z, self._firsts(), self.size.features)

    @torch.no_grad()
    def passes(self, z: Tensor, count: int) -> Tensor:
        return self.model.inverse(z, self._firsts()[:1], count)

    def twin(self) -> nn.Module:
        depth, own = self.model.depth, self.model
        blocks = [
            _dense_block(
                list(own.weights)[f : f + depth],
                list(own.biases)[f : f + depth],
                [~hidden for hidden in own.hidden[f : f + depth]],
            )
            for f in reversed(self._firsts())
        ]
        return Twin(blocks, bound=BOUND).to(self.device)


class DenseCompiled(Dense):
    """The clever user with torch.compile."""

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        self._log_prob = torch.compile(self.model.log_prob, dynamic=False)


def _naive_blocks(size: Size, seed: int) -> Iterator[NaiveMADE]:
    """Draws blocks with the degrees that fastmaf has by default, in natural order."""
    generator = torch.Generator().manual_seed(seed)
    degrees = hidden_degrees("spread", size.features, size.hidden, levels=size.levels)
    widths = (size.features, *size.hidden, 2 * size.features)
    for _ in range(size.blocks):
        weights, biases = [], []
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            bound = 1 / math.sqrt(inputs)
            weights.append(torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator))
            biases.append(torch.empty(outputs).uniform_(-bound, bound, generator=generator))
        yield NaiveMADE(input_degrees(size.features), degrees, weights, biases, log_scale_bound=BOUND)


def _dense_block(weights: list[Tensor], biases: list[Tensor], masks: list[Tensor]) -> DenseBlock:
    """Takes a block whose last rows are all shifts, then all log-scales, in natural order."""
    features = weights[0].shape[1]
    rows = torch.arange(2 * features).view(2, features).T.reshape(-1)
    weights, biases = [*weights[:-1], weights[-1][rows]], [*biases[:-1], biases[-1][rows]]
    return DenseBlock(weights, biases, degrees_of_masks(masks[:-1], masks[-1][:features]), torch.arange(features))
