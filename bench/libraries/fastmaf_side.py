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
    loading = "builds it"
    backend: ClassVar[str | None] = None
    graphs: ClassVar[bool] = True
    step: fastmaf.TrainingStep

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        self._replays = self.graphs and device != "cpu"
        self._set_flow(self._build())

    def _build(self) -> fastmaf.Flow:
        # With the order and the bound of the published run, so that the other libraries need no permutation.
        features, hidden, blocks, levels = self.size
        options = {"log_scale_bound": 5.0, "soft_bound": False, "levels": levels, "seed": self.seed}
        return fastmaf.MAF(features, blocks, hidden, order="natural", **options)  # type: ignore[arg-type]

    def _set_flow(self, flow: fastmaf.Flow) -> None:
        self.flow = flow.to(self.device)
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
        with fastmaf.use_backend(self.backend):
            return self.flow.sample(n)

    def inverse(self, z: Tensor, passes: int) -> Tensor:
        with torch.no_grad(), fastmaf.use_backend(self.backend):
            return self.flow.inverse(z)[0]

    def counterpart(self) -> nn.Module:
        return self.flow.to_naive().float().to(self.device)

    def save(self, path: Path) -> None:
        self.flow.save(path)

    def load(self, path: Path) -> None:
        self._set_flow(fastmaf.load(path))


class NoGraphs(Fastmaf):
    """fastmaf on a GPU without CUDA graphs: every kernel is launched from Python."""

    graphs = False


class TorchBackend(NoGraphs):
    """fastmaf's plain torch backend, with torch's fused Adam."""

    backend = "torch"

    def new_optimizer(self) -> None:
        optimizer = torch.optim.Adam(self.flow.parameters(), lr=LEARNING_RATE, fused=True)
        self.step = fastmaf.TrainingStep(self.flow, optimizer)


class BFloat16(Fastmaf):
    """fastmaf with weights stored as bfloat16, for densities and samples; its counterpart has the rounded weights."""

    trains = False

    def _build(self) -> fastmaf.Flow:
        return super()._build().to_inference(torch.bfloat16)
