"""Processes that train one model together, against one process with all of their samples."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import fastmaf
from fastmaf.optim import FusedAdam

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package"),
]
D = 24
# Of all processes together, from which each takes its share: the last ones are too few, or of unequal sizes.
BATCHES = [8, 8, 7, 1, 8, 3]


def flow_of(seed: int, **options: Any) -> fastmaf.MAF:
    return fastmaf.MAF(D, 3, (40, 33), order="alternate", seed=seed, whitening=3, dtype=torch.float64, **options)


def samples(i: int, n: int) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(i))


def in_group(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)


def trained(flow: nn.Module, step: fastmaf.TrainingStep, rank: int, size: int) -> list[float]:
    return [step(samples(i, n).tensor_split(size)[rank]).nll for i, n in enumerate(BATCHES)]


def one_of_many(rank: int, size: int, folder: str, max_grad_norm: float | None) -> None:
    in_group(rank, size, folder)
    flow = flow_of(seed=rank)  # all but the first begin elsewhere, and are set to it
    optimizer = FusedAdam(flow.parameters(), lr=1e-2, process_group=distributed.group.WORLD)
    step = fastmaf.TrainingStep(flow, optimizer, fastmaf.Guards(max_grad_norm=max_grad_norm))
    losses = trained(flow, step, rank, size)
    state = {f"{i}/{name}": value for i, s in optimizer.state_dict()["state"].items() for name, value in s.items()}
    torch.save((losses, flow.state_dict(), state), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("size, max_grad_norm", [(2, None), (2, 0.5), (4, 0.5)])
def test_the_model_of_one_process(tmp_path: Path, size: int, max_grad_norm: float | None) -> None:
    torch.multiprocessing.spawn(one_of_many, (size, str(tmp_path), max_grad_norm), nprocs=size)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    flow = flow_of(seed=0)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    expected = trained(flow, fastmaf.TrainingStep(flow, optimizer, fastmaf.Guards(max_grad_norm=max_grad_norm)), 0, 1)
    for losses, weights, state in results:
        assert losses == results[0][0]
        torch.testing.assert_close(losses, expected, rtol=1e-11, atol=0.0)
        for name, value in flow.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-8, atol=1e-10)
            assert torch.equal(weights[name], results[0][1][name]), f"processes differ in {name}"
        assert all(torch.equal(value, results[0][2][name]) for name, value in state.items())


class Shared(nn.Module):
    """A loss that uses every block twice, so that no gradient can be factored, and another parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = flow_of(seed=5)
        self.scale = nn.Parameter(torch.ones(D, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return -(self.flow.log_prob(x * self.scale) + self.flow.log_prob(0.5 * x)).mean()


def one_with_stored_gradients(rank: int, size: int, folder: str) -> None:
    in_group(rank, size, folder)
    model = Shared()
    optimizer = FusedAdam(model.parameters(), lr=1e-2, process_group=distributed.group.WORLD)
    for i in range(3):
        optimizer.minimize(model(samples(i, 6).tensor_split(size)[rank]))
    assert all(parameter.grad is None for parameter in model.parameters())
    bad = samples(9, 6)
    bad[0, 0] = float("nan")  # in the first process's share alone
    before = copy.deepcopy(model.state_dict())
    model.flow.validate_args = False
    with pytest.raises(fastmaf.NonFiniteLossError, match="1 of 2 processes"):
        optimizer.minimize(model(bad.tensor_split(size)[rank]))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_gradients_that_cannot_be_factored_and_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_with_stored_gradients, (2, str(tmp_path)), nprocs=2)
    model = Shared()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for i in range(3):
        optimizer.zero_grad()
        model(samples(i, 6)).backward()
        optimizer.step()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-8, atol=1e-10)
        assert torch.equal(first[name], second[name])


def one_that_counts(rank: int, size: int, folder: str) -> None:
    in_group(rank, size, folder)
    flow = fastmaf.MAF(3072, 1, (128, 128), seed=0)
    optimizer = FusedAdam(flow.parameters(), process_group=distributed.group.WORLD)
    assert optimizer.exchange is not None
    counts = []
    for batch in (2, 400):
        before = optimizer.exchange.sent
        optimizer.minimize(-flow.log_prob(torch.randn(batch, 3072)).mean())
        counts.append(optimizer.exchange.sent - before)
    torch.save(counts, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_fewer_bytes_than_gradients_and_never_more(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_that_counts, (2, str(tmp_path)), nprocs=2)
    flow = fastmaf.MAF(3072, 1, (128, 128), seed=0)
    gradients = 4 * sum(parameter.numel() for parameter in flow.parameters())  # of a ring of two: each half twice
    few, many = torch.load(tmp_path / "0.pt")
    assert few < 0.1 * gradients
    assert many <= gradients
