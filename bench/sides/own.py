"""fastmaf on the backends that it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

import fastmaf
from fastmaf.bench.sides.side import LEARNING_RATE, Side, Size


class Fastmaf(Side):
    """fastmaf as it is meant to be used: its default backend, its own Adam, and CUDA graphs on a GPU."""

    inverts_by_passes = False
    loads_into_itself = False
    backend: ClassVar[str | None] = None
    graphs: ClassVar[bool] = True
    flow: fastmaf.Flow
    step: fastmaf.TrainingStep

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        self.flow = build(size, seed).to(device)
        self._score = self._scoring()

    def _replays(self) -> bool:
        return self.graphs and self.device != "cpu"

    def _scoring(self) -> Callable[[Tensor], Tensor]:
        return fastmaf.ReplayedLogProb(self.flow) if self._replays() else self.flow.log_prob

    def _backend(self) -> fastmaf.use_backend:
        return fastmaf.use_backend(self.backend)

    def log_prob(self, x: Tensor) -> Tensor:
        with torch.no_grad(), self._backend():
            return self._score(x)

    def new_optimizer(self) -> None:
        optimizer = fastmaf.optim.FusedAdam(self.flow.parameters(), lr=LEARNING_RATE)
        self.step = fastmaf.TrainingStep(self.flow, optimizer, graphs=self._replays())

    def train_step(self, x: Tensor) -> None:
        with self._backend():
            self.step(x)

    def sample(self, n: int) -> Tensor:
        with torch.no_grad(), self._backend():
            return self.flow.sample(n)

    def inverse(self, z: Tensor) -> Tensor:
        with torch.no_grad(), self._backend():
            return self.flow.inverse(z)[0]

    def passes(self, z: Tensor, count: int) -> Tensor:
        raise NotImplementedError("fastmaf does not invert by passes")

    def twin(self) -> nn.Module:
        return self.flow.to_naive().to(self.device)

    def save(self, path: Path) -> None:
        self.flow.save(path)

    def load(self, path: Path) -> None:
        self.flow = fastmaf.load(path).to(self.device)
        self._score = self._scoring()


class NoGraphs(Fastmaf):
    """fastmaf on a GPU without CUDA graphs: every kernel is launched from Python."""

    graphs = False


class Reference(Fastmaf):
    """fastmaf's plain torch backend, with torch's fused Adam."""

    backend = "torch"
    graphs = False

    def new_optimizer(self) -> None:
        optimizer = torch.optim.Adam(self.flow.parameters(), lr=LEARNING_RATE, fused=True)
        self.step = fastmaf.TrainingStep(self.flow, optimizer)


class BFloat16(Fastmaf):
    """fastmaf with weights stored as bfloat16, which scores and samples."""

    trains = False

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        self.flow = self.flow.to_inference(torch.bfloat16)
        self._score = self._scoring()

    def new_optimizer(self) -> None:
        raise NotImplementedError("a flow with bfloat16 weights does not train")

    def twin(self) -> nn.Module:
        """Returns the naive model with the rounded weights."""
        same = build(self.size, self.seed)
        with torch.no_grad():
            for own, rounded in zip(same.parameters(), self.flow.parameters(), strict=True):
                own.copy_(rounded)
        return same.to_naive().to(self.device)


def build(size: Size, seed: int) -> fastmaf.MAF:
    """Builds a flow in natural order, as in the published run: the others then hold the function without a
    permutation.
    """
    return fastmaf.MAF(size.features, size.blocks, size.hidden, order="natural", levels=size.levels, seed=seed)
