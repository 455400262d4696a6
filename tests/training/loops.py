"""Loops that tests run in processes of their own, and by hand where a library is missing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.core.composed import Density, data


class NLL(nn.Module):
    """The loss as a module: what ``DistributedDataParallel`` wraps."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.density = Density(name)

    def forward(self, x: Tensor) -> Tensor:
        return -self.density(x).mean()


def batches() -> list[Tensor]:
    return [data(8, seed=seed) for seed in range(4)]


def fit(loss_of: nn.Module, batches: list[Tensor]) -> nn.Module:
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=1e-2)
    for x in batches:
        optimizer.zero_grad()
        loss_of(x).backward()
        nn.utils.clip_grad_norm_(loss_of.parameters(), 1.0)
        optimizer.step()
    return loss_of


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("MAF", {}),
    ("MAF", {"find_unused_parameters": True}),
    ("nflows", {"gradient_as_bucket_view": True}),
]


def distributed(rank: int, folder: str) -> None:
    """Trains on half of each batch, and writes the weights to files."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store")
    for name, options in RUNS:
        model = NLL(name)
        if rank:  # replaced by those of the first process
            vector = nn.utils.parameters_to_vector(model.parameters())
            nn.utils.vector_to_parameters(vector + 1.0, model.parameters())
        wrapped = nn.parallel.DistributedDataParallel(model, **options)
        fit(wrapped, [x[4 * rank : 4 * rank + 4] for x in batches()])
        torch.save(model.state_dict(), f"{folder}/{name} {options} {rank}.pt")
    torch.distributed.destroy_process_group()
