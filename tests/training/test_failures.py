"""An error in one of several processes ends all of them, by an error that names the process and what it failed with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import fastmaf
from fastmaf.optim import FusedAdam
from fastmaf.training.processes import started_together
from tests.training.test_exchange import D, in_group, samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package"),
]


def step_of(**options: Any) -> fastmaf.TrainingStep:
    flow = fastmaf.MAF(D, 2, (26,), order="natural", seed=0, dtype=torch.float64, **options)
    return fastmaf.TrainingStep(flow, FusedAdam(flow.parameters(), process_group=distributed.group.WORLD))


def one_row_at_the_last(rank: int, size: int, folder: str) -> None:
    in_group(rank, size, folder)
    for norm, words in (
        ("batch", "ValueError: BatchNorm needs a batch of at least 2 rows in training, .*found 1"),
        ("act", "ValueError: ActNorm starts by .* at least 2 rows; found 1"),
    ):
        step = step_of(normalization=norm)
        rows = 1 if rank == size - 1 else 4
        with pytest.raises(fastmaf.ProcessFailedError, match=f"process {size - 1} of {size} failed: {words}"):
            step(samples(0, rows))
        assert step.steps == 0
        step(samples(1, 4 * size).tensor_split(size)[rank])  # the group is as it was
        digest = torch.cat([parameter.detach().flatten() for parameter in step.flow.parameters()])
        found = [torch.empty_like(digest) for _ in range(size)]
        distributed.all_gather(found, digest)
        assert all(torch.equal(other, digest) for other in found)
    step = step_of()
    with pytest.raises(ValueError, match=r"x must have shape .*found \[4, 3\]"):  # each has its own
        step(samples(0, 4)[:, :3])
    distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_a_batch_of_one_row(tmp_path: Path, size: int) -> None:
    torch.multiprocessing.spawn(one_row_at_the_last, (size, str(tmp_path)), nprocs=size)


def as_torchrun_starts_them(rank: int, size: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    store = Path(folder) / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)


def fails_by_itself(rank: int, size: int, folder: str) -> None:
    as_torchrun_starts_them(rank, size, folder)

    def at_the_end() -> None:
        if rank == 1:
            raise KeyError("the last rows")

    def before_the_step() -> None:
        step = step_of()
        if rank == 1:
            raise OSError("no such image")
        step(samples(0, 4))

    def before_the_optimizer() -> None:
        if rank == 1:
            raise MemoryError("no memory for the flow")
        step_of()

    def all_of_them() -> None:
        raise ZeroDivisionError(rank)

    cases: list[tuple[Callable[[], None], str]] = [
        (at_the_end, "process 1 of 2 failed: KeyError: 'the last rows'"),
        (before_the_step, "process 1 of 2 failed: OSError: no such image"),
        (before_the_optimizer, "process 1 of 2 failed: MemoryError: no memory for the flow"),
    ]
    for work, words in cases:
        with pytest.raises(fastmaf.ProcessFailedError, match=words), started_together(torch.device("cpu")):
            work()
    with pytest.raises(ZeroDivisionError, match=str(rank)), started_together(torch.device("cpu")):
        all_of_them()
    distributed.destroy_process_group()


def test_an_error_at_any_place(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(fails_by_itself, (2, str(tmp_path)), nprocs=2)


def ends_alone(rank: int, size: int, folder: str) -> None:
    in_group(rank, size, folder)
    step = step_of()
    step(samples(0, 4))
    if rank == 1:
        os._exit(0)
    with pytest.raises(fastmaf.ProcessFailedError, match="the connection to another process broke"):
        step(samples(0, 4))


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ends_alone, (2, str(tmp_path)), nprocs=2)
