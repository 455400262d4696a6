"""Processes that train together hold one flow: what differs is named before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import fastmaf
from fastmaf.optim import FusedAdam
from tests.training.test_exchange import D, in_group, samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package"),
]


def flow_of(seed: int, **options: Any) -> fastmaf.MAF:
    settings = {"hidden_features": (26,), "order": "natural", "seed": seed, "dtype": torch.float64, **options}
    return fastmaf.MAF(D, 2, **settings)


def step_of(flow: fastmaf.MAF) -> fastmaf.TrainingStep:
    return fastmaf.TrainingStep(flow, FusedAdam(flow.parameters(), process_group=distributed.group.WORLD))


def different(rank: int, size: int, folder: str) -> None:
    in_group(rank, size, folder)
    share = samples(0, 6).tensor_split(size)[rank]
    for options in ({"degrees": "random"}, {"hidden_features": (26 + rank,)}, {"dtype": (torch.float64, None)[rank]}):
        with pytest.raises(fastmaf.ProcessesDifferError, match="parameters of process 1 differ from those of process"):
            step_of(flow_of(rank, **options))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"order": "random"}, r"transforms\.\d+\.permutation of process 1 differs from that of process 0"),
        ({"activation": ("relu", "tanh")[rank]}, "the flow of process 1 differs from that of process 0 in its"),
    ]
    for options, words in cases:
        step = step_of(flow_of(rank, **options))
        with pytest.raises(fastmaf.ProcessesDifferError, match=words):
            step(share)
        assert step.steps == 0
    flow = flow_of(rank)
    step = step_of(flow)
    if rank == 1:  # after the parameters were set to those of the first process
        flow.get_parameter("transforms.0.made.output.bias").data[3] += 1e-9
    with pytest.raises(fastmaf.ProcessesDifferError, match=r"transforms\.0\.made\.output\.bias of process 1"):
        step(share)
    step_of(flow_of(rank))(share)
    distributed.destroy_process_group()


def test_what_differs_is_named_in_every_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(different, (2, str(tmp_path)), nprocs=2)


def normalised(rank: int, size: int, folder: str) -> None:
    in_group(rank, size, folder)
    for kind in ("batch", "act"):
        flow = flow_of(0, normalization=kind)
        step = step_of(flow)
        for i in range(3):
            step(samples(i, 12).tensor_split(size)[rank])
        torch.save(flow.state_dict(), f"{folder}/{kind}{rank}.pt")
    distributed.destroy_process_group()


def test_normalisations_are_equal_in_all_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(normalised, (2, str(tmp_path)), nprocs=2)
    for kind in ("batch", "act"):
        first, second = (torch.load(tmp_path / f"{kind}{rank}.pt") for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
    flow = flow_of(0, normalization="batch")
    places = [i for i, transform in enumerate(flow.transforms) if isinstance(transform, fastmaf.BatchNorm)]
    assert not torch.equal(torch.load(tmp_path / "batch0.pt")[f"transforms.{places[0]}.running_mean"], torch.zeros(D))


def alone(rank: int, size: int, folder: str) -> None:
    in_group(rank, size, folder)
    for make in (torch.optim.Adam, torch.optim.SGD, FusedAdam):
        flow = flow_of(0)
        step = fastmaf.TrainingStep(flow, make(flow.parameters(), lr=1e-3))
        before = {name: value.clone() for name, value in flow.state_dict().items()}
        with pytest.raises(RuntimeError, match="runs 2 processes, over which this optimizer does not average"):
            step(samples(rank, 4))
        assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())
    distributed.destroy_process_group()


def test_an_optimizer_that_averages_nothing_is_refused(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(alone, (2, str(tmp_path)), nprocs=2)
