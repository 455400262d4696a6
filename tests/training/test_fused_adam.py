"""FusedAdam: the numbers of torch.optim.Adam, on every backend; minimize without a gradient of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastmaf
from fastmaf import Guards, TrainingStep
from fastmaf.kernels.factored_grad import FactoredGrad
from fastmaf.kernels.flow import forward as flow_op
from fastmaf.training.adam_updates import StepCounts
from fastmaf.training.fused_adam import FusedAdam
from tests.core.helpers import build, correlated, layers_of, padding_of
from tests.tolerances import error

pytestmark = pytest.mark.usefixtures("backend")

D = 13
# In float64; Adam divides by the gradient's own size, so that the rounding of a small one counts in full.
TOLERANCE = 1e-9
OPTIONS: list[dict[str, Any]] = [
    {}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"maximize": True},
    {"betas": (0.5, 0.7)}, {"eps": 1e-2}, {"betas": (0.0, 0.9), "lr": 0.02},
    {"maximize": True, "weight_decay": 0.2, "decoupled_weight_decay": True},
]  # fmt: skip
Optimizer = type[torch.optim.Adam]
WAYS = ["step", "minimize", "clip"]


def batch(i: int, n: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    return correlated(n, D, seed=i, dtype=dtype)


def loss_of(flow: fastmaf.Flow, i: int) -> Tensor:
    return -flow.log_prob(batch(i, dtype=next(flow.parameters()).dtype)).mean()


def pair(**options: Any) -> tuple[fastmaf.MAF, fastmaf.MAF]:
    """Returns two equal flows; the first is for FusedAdam."""
    flow = build(D, **options)
    return flow, copy.deepcopy(flow)


def take_step(flow: fastmaf.MAF, optimizer: torch.optim.Optimizer, loss: Tensor, way: str) -> None:
    """Takes a step on a loss: by ``backward`` and ``step``, or by ``minimize`` where the optimiser has it."""
    if way == "step" or not isinstance(optimizer, FusedAdam):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    else:
        with stores_no_gradient():
            assert optimizer.minimize(loss, math.inf if way == "clip" else None)
        assert all(p.grad is None and not hasattr(p, "_gradient_sink") for p in flow.parameters())


@contextmanager
def stores_no_gradient() -> Iterator[None]:
    """Fails where an op forms the gradient of a weight."""
    message = "the gradient of a weight was formed"
    with (
        mock.patch.object(flow_op, "_backward", side_effect=AssertionError(message)),
        mock.patch.object(FactoredGrad, "grad_weight", side_effect=AssertionError(message)),
    ):
        yield


def assert_same(
    found: nn.Module, expected: nn.Module, start: nn.Module | None = None, *, tolerance: float = TOLERANCE
) -> None:
    for (name, own), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert error(own, other) <= tolerance, name
    if start is not None:
        assert any(not torch.equal(a, b) for a, b in zip(found.parameters(), start.parameters(), strict=True))


def assert_same_state(found: torch.optim.Adam, expected: torch.optim.Adam) -> None:
    own, other = found.state_dict()["state"], expected.state_dict()["state"]
    assert own.keys() == other.keys()
    for key, state in other.items():
        assert own[key].keys() == state.keys()
        for name, value in state.items():
            assert own[key][name].dtype == value.dtype and error(own[key][name], value) <= TOLERANCE, name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_numbers_of_adam(options: dict[str, Any], way: str) -> None:
    flow, plain = pair()
    start = copy.deepcopy(flow)
    fused, adam = FusedAdam(flow.parameters(), **options), torch.optim.Adam(plain.parameters(), **options)
    for i in range(10):
        take_step(plain, adam, loss_of(plain, i), "step")
        take_step(flow, fused, loss_of(flow, i), way)
    assert_same(flow, plain, start)
    assert_same_state(fused, adam)
    for layer in layers_of(flow).values():
        hidden = padding_of(layer)
        assert hidden.any() and not layer.weight.detach()[hidden].any()
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not fused.state[layer.weight][moment][hidden].any(), f"{moment} of the padding"


@pytest.mark.parametrize("way", WAYS)
def test_float32_follows_adam(way: str) -> None:
    """Loosely: Adam turns the sign of a gradient that is all rounding into a whole step."""
    flow, plain = pair(dtype=torch.float32)
    fused, adam = FusedAdam(flow.parameters()), torch.optim.Adam(plain.parameters())
    for i in range(10):
        take_step(plain, adam, loss_of(plain, i), "step")
        take_step(flow, fused, loss_of(flow, i), way)
    for own, other in zip(flow.parameters(), plain.parameters(), strict=True):
        assert error(own, other) <= 1e-4


def both(
    run: Callable[[fastmaf.MAF, Any], Any],
    make: Callable[[Optimizer, fastmaf.MAF], Any] | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    """Runs the same with both optimisers and compares the flows."""
    flow, plain = pair()
    start = copy.deepcopy(flow)
    results = []
    for model, kind in ((flow, FusedAdam), (plain, torch.optim.Adam)):
        optimizer = kind(model.parameters(), lr=1e-2) if make is None else make(kind, model)
        results.append(run(model, optimizer))
    if results[0] is not None:
        assert results[0] == pytest.approx(results[1], rel=tolerance)
    assert_same(flow, plain, start, tolerance=tolerance)


def test_one_dimension_whose_layers_have_no_weights() -> None:
    """Layers without a weight have no storage that could tell them apart."""
    flow = fastmaf.MAF(1, 3, (4, 4), seed=0, dtype=torch.float64)
    other = copy.deepcopy(flow)
    own, theirs = FusedAdam(flow.parameters(), lr=1e-2), torch.optim.Adam(other.parameters(), lr=1e-2)
    for i in range(3):
        x = torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        own.minimize(-flow.log_prob(x).mean())
        theirs.zero_grad()
        (-other.log_prob(x).mean()).backward()
        theirs.step()
    for mine, expected in zip(flow.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


def test_gradients_accumulate() -> None:
    def run(flow: fastmaf.MAF, optimizer: Any) -> None:
        for i in range(5):
            optimizer.zero_grad()
            for k in range(3):
                (loss_of(flow, 3 * i + k) / 3).backward()
            optimizer.step()

    both(run)


def test_weights_used_twice_in_one_loss() -> None:
    def run(flow: fastmaf.MAF, optimizer: Any) -> None:
        for i in range(3):
            optimizer.zero_grad()
            (loss_of(flow, i) + 0.5 * loss_of(flow, i + 10)).backward()
            optimizer.step()

    both(run)


def test_closure() -> None:
    def run(flow: fastmaf.MAF, optimizer: Any) -> list[float]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(flow, 1)
            loss.backward()
            return loss

        return [float(optimizer.step(closure).detach()) for _ in range(4)]

    both(run)


def test_groups_of_different_learning_rates_and_a_schedule() -> None:
    def make(kind: Optimizer, flow: fastmaf.MAF) -> Any:
        first, *others = flow.transforms
        rest = [p for t in others for p in t.parameters()]
        return kind([{"params": list(first.parameters()), "lr": 3e-2, "weight_decay": 0.1}, {"params": rest}], lr=1e-3)

    def run(flow: fastmaf.MAF, optimizer: Any) -> None:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.3)
        for i in range(6):
            optimizer.zero_grad()
            loss_of(flow, i).backward()
            optimizer.step()
            scheduler.step()

    both(run, make)


@pytest.mark.parametrize("limit", [1e-2, 1.0, math.inf])
@pytest.mark.parametrize("way", ["step", "minimize"])
def test_clipping(limit: float, way: str) -> None:
    def run(flow: fastmaf.MAF, optimizer: Any) -> list[float]:
        norms = []
        for i in range(5):
            loss = loss_of(flow, i)
            if isinstance(optimizer, FusedAdam) and way == "minimize":
                assert optimizer.minimize(loss, limit)
                continue
            optimizer.zero_grad()
            loss.backward()
            if isinstance(optimizer, FusedAdam):
                norms.append(optimizer.clip_grad_norm_(limit))
            else:
                norms.append(float(nn.utils.clip_grad_norm_(flow.parameters(), limit)))
            optimizer.step()
        return norms if way == "step" else []

    # A large eps, so that the size of the gradients matters to Adam. torch divides by the norm plus 1e-6.
    both(run, lambda kind, flow: kind(flow.parameters(), lr=1e-2, eps=1.0), tolerance=1e-6)


@pytest.mark.parametrize("guards", [
    Guards(), Guards(warmup_steps=4), Guards(max_grad_norm=1e-2), Guards(max_loss_jump=5.0),
    Guards(warmup_steps=3, max_grad_norm=0.1, max_loss_jump=5.0),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("rows", [2, 16])  # few rows: gradients are in factored form
def test_guarded_training(guards: Guards, rows: int) -> None:
    def run(flow: fastmaf.MAF, optimizer: Any) -> list[float]:
        step = TrainingStep(flow, optimizer, guards)
        reports = [step(batch(i, rows) * (30 if i == 5 else 1)) for i in range(10)]
        assert [r.skipped for r in reports] == [guards.max_loss_jump is not None and i == 5 for i in range(10)]
        return [r.nll for r in reports]

    both(run)


class CounterOnGpu:
    """A counter whose reading waits; writes to it change its version, replays of a graph do not."""

    is_cpu = False

    def __init__(self, value: int) -> None:
        self.value, self._version, self.reads = value, 0, 0

    def __int__(self) -> int:
        self.reads += 1
        return self.value


def test_counters_on_a_gpu_are_read_once_and_followed_through_replays() -> None:
    counts, parameters = StepCounts(), [torch.zeros(1), torch.zeros(1), torch.zeros(1)]
    counters: dict[Any, Any] = {p: CounterOnGpu(5 + i) for i, p in enumerate(parameters)}
    replayed_ones = {parameter: counters[parameter] for parameter in parameters[:2]}

    def values() -> list[int]:
        return [counts.of(parameter, counter) for parameter, counter in counters.items()]

    assert values() == values() == [5, 6, 7]
    first = counts.begin_replays(replayed_ones)
    for _ in range(3):
        first.taken += 1
    second = counts.begin_replays(counters)  # a graph for another batch
    second.taken += 1
    assert values() == values() == [9, 10, 8]
    assert counts.replayed is None, "the next replay must look at the counters"
    assert [counter.reads for counter in counters.values()] == [1, 1, 1]
    third = counts.begin_replays(counters)
    third.taken += 1
    counters[parameters[1]].value, counters[parameters[1]]._version = 40, 1
    assert values() == [10, 40, 9]
    assert [counter.reads for counter in counters.values()] == [1, 2, 1]
