"""Moments split among processes: the steps of processes that hold them all, and a state for any number of processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

import fastmaf
from fastmaf.kernels.layout import PANEL
from fastmaf.optim import FusedAdam
from fastmaf.training.sharded_state import MOMENTS, ShardedState
from tests.training.test_exchange import D, Shared, flow_of, in_group, samples, trained

slow = pytest.mark.slow
available = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")


def step_of(flow: fastmaf.MAF, norm: float | None = 0.5, **options: Any) -> fastmaf.TrainingStep:
    optimizer = FusedAdam(flow.parameters(), lr=1e-2, process_group=distributed.group.WORLD)
    return fastmaf.TrainingStep(flow, optimizer, fastmaf.Guards(max_grad_norm=norm), **options)


def state_of(step: fastmaf.TrainingStep) -> dict[str, Tensor]:
    state = step.optimizer.state_dict()["state"]
    return {f"{i}/{name}": value for i, entry in state.items() for name, value in entry.items()}


def held(step: fastmaf.TrainingStep) -> int:
    return sum(entry[name].nbytes for entry in step.optimizer.state.values() for name in MOMENTS)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def split(rank: int, size: int, folder: str, dtype: torch.dtype, norm: float | None) -> None:
    in_group(rank, size, folder)
    flows = [flow_of(seed=0).to(dtype) for _ in range(2)]
    steps = [step_of(flow, norm, shard_optimizer=shard) for flow, shard in zip(flows, (False, True), strict=True)]

    def train(flow: fastmaf.MAF, step: fastmaf.TrainingStep) -> list[float]:
        return [step(samples(i, n).tensor_split(size)[rank].to(dtype)).nll for i, n in enumerate([8, 7, 1, 400, 8])]

    losses, expected = (train(*pair) for pair in zip(flows, steps, strict=True))
    assert losses == expected
    assert equal(flows[0].state_dict(), flows[1].state_dict()), "the same sums are the same to the bit"
    whole, parts = held(steps[0]), held(steps[1])
    found = torch.tensor([float(parts)])
    distributed.all_reduce(found)
    assert float(found) == whole, "each moment is held once"
    widest = max(PANEL * layer.layout.in_features for layer in flows[0]._layers()) * dtype.itemsize
    assert abs(parts - whole / size) <= 2 * widest, "equal parts, to a panel"
    states = [state_of(step) for step in steps]
    assert equal(*states)
    if rank == 0:
        torch.save((flows[1].state_dict(), states[1]), f"{folder}/state.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    "size, dtype, norm", [(2, torch.float32, None), (4, torch.float32, 0.5), (2, torch.float64, 0.5)]
)
@slow
@available
def test_the_steps_of_processes_that_hold_the_whole_state(
    tmp_path: Path, size: int, dtype: torch.dtype, norm: float | None
) -> None:
    torch.multiprocessing.spawn(split, (size, str(tmp_path), dtype, norm), nprocs=size)


def resumed(rank: int, size: int, folder: str, source: str, shard: bool) -> None:
    in_group(rank, size, folder)
    weights, state = torch.load(f"{source}/state.pt")
    flow = flow_of(seed=1)
    step = step_of(flow, shard_optimizer=shard)
    flow.load_state_dict(weights)
    groups = step.optimizer.state_dict()["param_groups"]
    numbers = {int(name.split("/")[0]) for name in state}
    entries = {i: {k.split("/")[1]: v for k, v in state.items() if int(k.split("/")[0]) == i} for i in numbers}
    step.optimizer.load_state_dict({"state": entries, "param_groups": groups})
    assert equal(state_of(step), state)
    trained(flow, step, rank, size)
    if rank == 0:
        torch.save(flow.state_dict(), f"{folder}/after.pt")
    distributed.destroy_process_group()


@slow
@available
def test_a_state_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    for name in ("first", "4", "2", "whole"):
        (tmp_path / name).mkdir()
    torch.multiprocessing.spawn(split, (2, str(tmp_path / "first"), torch.float64, 0.5), nprocs=2)
    for name, size, shard in (("4", 4, True), ("2", 2, True), ("whole", 2, False)):
        arguments = (size, str(tmp_path / name), str(tmp_path / "first"), shard)
        torch.multiprocessing.spawn(resumed, arguments, nprocs=size)
    after = {name: torch.load(tmp_path / name / "after.pt") for name in ("4", "2", "whole")}
    assert equal(after["2"], after["whole"])
    for name, value in after["whole"].items():
        torch.testing.assert_close(after["4"][name], value, rtol=1e-8, atol=1e-10)


def odd_ones(rank: int, size: int, folder: str) -> None:
    in_group(rank, size, folder)
    group = distributed.group.WORLD
    models, results = [Shared() for _ in range(2)], []
    for model, shard in zip(models, (False, True), strict=True):
        optimizer = FusedAdam(model.parameters(), lr=1e-2, weight_decay=0.1, process_group=group)
        if shard:
            optimizer.shard({layer.weight: layer.layout for layer in model.flow._layers()})
        for i in range(3):  # every gradient is stored
            optimizer.minimize(model(samples(i, 6).tensor_split(size)[rank]))
        results.append(copy.deepcopy(model.state_dict()))
    assert equal(*results)
    with pytest.raises(RuntimeError, match="use minimize"):
        models[1](samples(0, 4)).backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match="all parameters at first"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    with pytest.raises(RuntimeError, match="before its first step"):
        used = FusedAdam(models[0].parameters(), process_group=group)
        used.minimize(models[0](samples(0, 4)))
        used.shard({})
    flow = flow_of(0)
    with pytest.raises(ValueError, match="amsgrad"):
        FusedAdam(flow.parameters(), amsgrad=True, process_group=group).shard({})
    with pytest.raises(ValueError, match="contiguous"):
        FusedAdam([torch.nn.Parameter(torch.zeros(3, 4).t())], process_group=group).shard({})
    distributed.destroy_process_group()


@slow
@available
def test_gradients_that_are_stored_and_what_cannot_be_split(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(odd_ones, (2, str(tmp_path)), nprocs=2)


class Among:
    """What the pieces are cut for, without processes."""

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, 0


@pytest.mark.parametrize("size", [2, 3, 8, 64])
@pytest.mark.parametrize("features, hidden", [(2, (3,)), (24, (40, 33)), (192, (64, 64))])
def test_pieces_cover_every_number_once(features: int, hidden: tuple[int, ...], size: int) -> None:
    flow = fastmaf.MAF(features, 2, hidden, order="natural")
    layouts = {layer.weight: layer.layout for layer in flow._layers()}
    pieces = ShardedState(Among(size), flow.parameters(), layouts).pieces  # type: ignore[arg-type]
    for parameter in flow.parameters():
        own = [piece for piece in pieces if piece.parameter is parameter]
        ends = [0, *(piece.end for piece in own)]
        assert [piece.start for piece in own] == ends[:-1] and ends[-1] == parameter.numel()
        layout = layouts.get(parameter)
        for piece in own if layout is not None else ():
            assert piece.panels is not None
            assert [PANEL * int(layout.panels[p]) for p in piece.panels] == [piece.start, piece.end]
    owners = [piece.owner for piece in pieces]
    assert owners == sorted(owners) and set(owners) <= set(range(size))


def test_one_process_splits_nothing_and_other_optimizers_are_refused() -> None:
    flow = fastmaf.MAF(D, 1, (8,), order="natural")
    step = fastmaf.TrainingStep(flow, FusedAdam(flow.parameters()), shard_optimizer=True)
    step(torch.zeros(4, D))
    assert all(entry["exp_avg"].shape == p.shape for p, entry in step.optimizer.state.items())
    with pytest.raises(ValueError, match="shard_optimizer is for FusedAdam; found Adam"):
        fastmaf.TrainingStep(flow, torch.optim.Adam(flow.parameters()), shard_optimizer=True)
