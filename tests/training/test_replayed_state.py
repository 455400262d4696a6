"""Replays after changes that leave every address as it was: on the CPU, with stand-ins for the graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.training import cuda_graphs as graphs
from fastmaf.training.captured_updates import CapturedUpdates
from tests.core.helpers import build
from tests.tolerances import F32
from tests.training.graph_helpers import batches, needs_triton

pytestmark = [needs_triton, pytest.mark.slow, pytest.mark.usefixtures("triton", "run_again")]

Change = Callable[[fastmaf.MAF, fastmaf.optim.FusedAdam], None]


def small_flow() -> fastmaf.MAF:
    return build(13, seed=3, blocks=1, order="natural", hidden_features=(9,), dtype=F32)


def train(graphs: bool, changes: dict[int, Change], sizes: list[int], guards: fastmaf.Guards | None = None) -> Any:
    """Returns the losses, parameters and state of steps; a change is made before the step of its number."""
    flow = small_flow()
    first, *others = flow.parameters()
    optimizer = fastmaf.optim.FusedAdam([{"params": [first], "lr": 2e-2}, {"params": others}], lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, guards, graphs=graphs)
    losses = []
    for number, x in enumerate(batches("cpu", sizes)):
        changes.get(number, lambda *_: None)(flow, optimizer)
        losses.append(step(x).nll)
    values = [value for layer in flow._layers() for value in (layer.dense_weight(), layer.bias.detach())]
    return losses, values, [float(state["step"]) for state in optimizer.state.values()]


def set_counter(flow: fastmaf.MAF, optimizer: fastmaf.optim.FusedAdam) -> None:
    list(optimizer.state.values())[3]["step"].fill_(40)


def replace_counter(flow: fastmaf.MAF, optimizer: fastmaf.optim.FusedAdam) -> None:
    list(optimizer.state.values())[2]["step"] = torch.tensor(30.0)


def load_own_state(flow: fastmaf.MAF, optimizer: fastmaf.optim.FusedAdam) -> None:
    """The tensors stay; the groups, and their learning rates, are other objects."""
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[1]["lr"] = 3e-2


def fill_moments(flow: fastmaf.MAF, optimizer: fastmaf.optim.FusedAdam) -> None:
    """Also where they belong to the padding, as after loading a file of another program."""
    state = copy.deepcopy(optimizer.state_dict())
    for moments in state["state"].values():
        moments["exp_avg"].fill_(0.1)
        moments["exp_avg_sq"].fill_(0.2)
    optimizer.load_state_dict(state)


@torch.no_grad()
def write_padding(flow: fastmaf.MAF, optimizer: fastmaf.optim.FusedAdam) -> None:
    for parameter in flow.parameters():
        parameter.add_(0.01)


def step_elsewhere(flow: fastmaf.MAF, optimizer: fastmaf.optim.FusedAdam) -> None:
    """A step of some parameters, without graphs: their counters then differ from the others'."""
    biases = [layer.bias for layer in flow._layers()]
    for bias in biases:
        bias.grad = torch.full_like(bias, 0.1)
    torch.optim.Adam.step(optimizer)
    optimizer.zero_grad()


def halve_rate(flow: fastmaf.MAF, optimizer: fastmaf.optim.FusedAdam) -> None:
    optimizer.param_groups[0]["lr"] /= 2


@pytest.mark.parametrize(
    "change",
    [set_counter, replace_counter, load_own_state, fill_moments, write_padding, step_elsewhere, halve_rate],
)
def test_replays_follow(change: Change) -> None:
    changes, sizes = {3: change}, [2, 2, 2, 2, 2]
    for graphed, eager in zip(train(True, changes, sizes), train(False, changes, sizes), strict=True):
        torch.testing.assert_close(graphed, eager, rtol=0.0, atol=0.0)


def test_moments_leave_the_padding_of_weights_zero() -> None:
    """A replay does not clear padding, so it must not be moved there by moments that came from elsewhere."""
    flow, x = small_flow(), batches("cpu", [2])[0]
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, graphs=True)
    step(x)
    fill_moments(flow, optimizer)
    step(x)
    layer = flow._layers()[0]
    moments = [optimizer.state[layer.weight][name] for name in ("exp_avg", "exp_avg_sq")]
    assert not any(map(layer.layout.padding_is_zero, moments)), "the test wants moments in the padding"
    step(x)
    assert all(map(layer.layout.padding_is_zero, (layer.weight.detach(), *moments)))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts how often the counters of a captured step are read one by one."""
    reads: list[int] = []
    of = fastmaf.training.adam_updates.StepCounts.of

    def counted(self: Any, parameter: torch.Tensor, counter: torch.Tensor) -> int:
        reads.append(1)
        return of(self, parameter, counter)

    monkeypatch.setattr(fastmaf.training.adam_updates.StepCounts, "of", counted)
    return reads


def test_counters_are_read_only_after_something_else_wrote_to_them(sent: list[int]) -> None:
    flow, x = small_flow(), batches("cpu", [2])[0]
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, graphs=True)
    reads = []
    for number in range(6):
        if number == 4:
            set_counter(flow, optimizer)
        sent.clear()
        step(x)
        reads.append(len(sent))
    assert reads[2] == reads[3] == reads[5] == 0
    assert reads[0] and reads[1] and reads[4] == len(list(flow.parameters()))
    assert [float(state["step"]) for state in optimizer.state.values()].count(6.0) == reads[4] - 1


def test_padding_is_looked_at_only_after_something_else_wrote_to_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x = small_flow(), batches("cpu", [2])[0]
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, graphs=True)
    looks, zero_padding_ = [], graphs.zero_padding_

    def looked(layers: Any) -> None:
        looks.append(1)
        zero_padding_(layers)

    monkeypatch.setattr(graphs, "zero_padding_", looked)
    counts = []
    for number in range(6):
        if number == 4:
            write_padding(flow, optimizer)
        looks.clear()
        step(x)
        counts.append(len(looks))
    assert counts[2:] == [0, 0, 1, 0]


def test_both_buffers_of_the_scalars_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transfer of one may still be under way when the next step is prepared."""
    flow = small_flow()
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, graphs=True)
    used: list[int] = []
    send = CapturedUpdates.send

    def watched(self: CapturedUpdates, scale: float) -> None:
        send(self, scale)
        used.append(self._hosts[0][0].data_ptr())

    monkeypatch.setattr(CapturedUpdates, "send", watched)
    for x in batches("cpu", [2, 2, 2, 2]):
        step(x)
    each = used[::2]
    assert used[1::2] == each, "the scalars were sent twice though nothing had changed"
    assert len(each) == 3 and each[0] == each[2] != each[1]
