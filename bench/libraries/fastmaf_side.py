"""fastmaf on its backends."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

import fastmaf
from fastmaf.bench.libraries.base import LEARNING_RATE, Library, Size


class Fastmaf(Library):
    """fastmaf as recommended: the default backend, its own Adam, and CUDA graphs on a GPU."""

    inverts_by_passes = False
    loads_into_itself = False
    backend: ClassVar[str | None] = None
    graphs: ClassVar[bool] = True
    flow: fastmaf.Flow
    step: fastmaf.TrainingStep

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        self._set_flow(self._build())

    def _build(self) -> fastmaf.Flow:
        # With the order and the bound of the published run, so that the other libraries need no permutation.
        size = self.size
        return fastmaf.MAF(
            size.features,
            size.blocks,
            size.hidden,
            order="natural",
            log_scale_bound=5.0,
            levels=size.levels,
            seed=self.seed,
            soft_bound=False,
        )

    def _set_flow(self, flow: fastmaf.Flow) -> None:
        self.flow = flow.to(self.device)
        self._replays = self.graphs and self.device != "cpu"
        self._log_prob = fastmaf.ReplayedLogProb(self.flow) if self._replays else self.flow.log_prob

    def log_prob(self, x: Tensor) -> Tensor:
        with torch.no_grad(), fastmaf.use_backend(self.backend):
            return self._log_prob(x)

    def new_optimizer(self) -> None:
        optimizer = fastmaf.optim.FusedAdam(self.flow.parameters(), lr=LEARNING_RATE)
        self.step = fastmaf.TrainingStep(self.flow, optimizer, graphs=self._replays)

    def train_step(self, x: Tensor) -> None:
        with fastmaf.use_backend(self.backend):
            self.step(x)

    def sample(self, n: int) -> Tensor:
        with torch.no_grad(), fastmaf.use_backend(self.backend):
            return self.flow.sample(n)

    def inverse(self, z: Tensor) -> Tensor:
        with torch.no_grad(), fastmaf.use_backend(self.backend):
            return self.flow.inverse(z)[0]

    def passes(self, z: Tensor, count: int) -> Tensor:
        raise NotImplementedError("fastmaf does not invert by passes")

    def counterpart(self) -> nn.Module:
        return self.flow.to_naive().to(self.device)

    def save(self, path: Path) -> None:
        self.flow.save(path)

    def load(self, path: Path) -> None:
        self._set_flow(fastmaf.load(path))


class NoGraphs(Fastmaf):
    """fastmaf on a GPU without CUDA graphs: every kernel is launched from Python."""

    graphs = False


class TorchBackend(Fastmaf):
    """fastmaf's plain torch backend, with torch's fused Adam."""

    backend = "torch"
    graphs = False

    def new_optimizer(self) -> None:
        optimizer = torch.optim.Adam(self.flow.parameters(), lr=LEARNING_RATE, fused=True)
        self.step = fastmaf.TrainingStep(self.flow, optimizer)


class BFloat16(Fastmaf):
    """fastmaf with weights stored as bfloat16, for densities and samples."""

    trains = False

    def _build(self) -> fastmaf.Flow:
        return super()._build().to_inference(torch.bfloat16)

    def new_optimizer(self) -> None:
        raise NotImplementedError("a flow with bfloat16 weights cannot be trained")

    def counterpart(self) -> nn.Module:
        """Returns the naive model with the rounded weights."""
        rounded = super()._build()
        with torch.no_grad():
            for parameter, stored in zip(rounded.parameters(), self.flow.parameters(), strict=True):
                parameter.copy_(stored)
        return rounded.to_naive().to(self.device)
