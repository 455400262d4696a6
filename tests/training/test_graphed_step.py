"""Replayed training steps: on a GPU the graphs themselves; on the CPU what surrounds them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.training import cuda_graphs as graphs
from fastmaf.training import graphed_step
from fastmaf.training.gradient_sink import Gradients
from tests.training.graph_helpers import batches, flow_on, needs_triton, on_gpu

pytestmark = needs_triton


def train_twice(device: str, max_grad_norm: float | None, sizes: list[int]) -> None:
    """Takes eager and replayed steps from one start, with two batch sizes and a learning rate that changes.

    The batches are so small that eager steps are in factored form, too.
    """
    losses, flows, states = [], [], []
    guards = fastmaf.Guards(warmup_steps=4, max_grad_norm=max_grad_norm)
    for graphed in (False, True):
        flow = flow_on(device)
        optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2, weight_decay=0.01)
        step = fastmaf.TrainingStep(flow, optimizer, guards, graphs=graphed)
        losses.append([step(x).nll for x in batches(device, sizes)])
        flows.append(flow)
        states.append(optimizer.state_dict()["state"])
    # In a clipped step the biases are updated by torch without graphs, and by the kernel with them: a moment that
    # is the difference of large ones then has their rounding errors, so tensors are compared norm-wise.
    pairs = [(torch.tensor(losses[0]), torch.tensor(losses[1]))]
    pairs += list(zip(flows[0].parameters(), flows[1].parameters(), strict=True))
    pairs += [(value, states[1][key][name]) for key, tensors in states[0].items() for name, value in tensors.items()]
    for a, b in pairs:
        if max_grad_norm is None:
            assert torch.equal(a, b.to(a.device))
        else:
            assert (a - b.to(a.device)).norm() <= 1e-5 * a.norm()


@on_gpu
@pytest.mark.parametrize("max_grad_norm", [None, 0.05, 1e9])
def test_replayed_steps_are_the_eager_ones(max_grad_norm: float | None) -> None:
    train_twice("cuda", max_grad_norm, [2, 2, 2, 1, 2, 1, 1, 2])


@pytest.mark.slow
@pytest.mark.usefixtures("triton", "run_again")
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_the_code_of_replayed_steps_on_the_cpu(max_grad_norm: float | None) -> None:
    """Without the faults that only a capture has, but with the counters and scalars of each replay."""
    train_twice("cpu", max_grad_norm, [2, 2, 1, 2, 1])


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("clips", [False, True])
def test_nothing_is_compiled_while_a_graph_is_recorded(clips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled for the alignment of its pointers too: all that a graph holds must have run before."""
    from fastmaf.bench.dev import resources
    from fastmaf.kernels.triton_common import device as triton_parts

    flow, x = flow_on("cpu", blocks=3, order="alternate"), batches("cpu", [4])[0]
    flow.validate_args = False  # kernels are recorded, not run: there are no values
    optimizer = fastmaf.optim.FusedAdam(flow.parameters())
    in_graphs: list[triton_parts.Launched] = []

    class Recorded:
        def __init__(self, run: Callable[[], None], device: torch.device, pool: Any = None) -> None:
            assert triton_parts._launches is not None
            before = len(triton_parts._launches)
            run()
            in_graphs.extend(triton_parts._launches[before:])

        def pool(self) -> None:
            return None

    def steps() -> None:
        loss = -flow.log_prob(x).mean()
        optimizer.minimize(loss, 1.0 if clips else None, check_finite=False)
        graphed_step.GraphedStep(flow, optimizer, x, 1.0 if clips else None)
        with torch.no_grad():
            flow.log_prob(x)
            graphs._GraphedLogProb(flow, x)

    def squared_norm(gradients: Gradients) -> float:
        measured(gradients)
        return 1.0  # nothing has values here

    measured = Gradients.squared_norm
    monkeypatch.setattr(Gradients, "squared_norm", squared_norm)
    monkeypatch.setattr(graphs, "record", Recorded)
    monkeypatch.setattr(graphed_step, "record", Recorded)
    launches = resources.recorded(90, steps)
    graphed = [id(one) for one in in_graphs]
    known = {repr(resources.source_of(one)) for one in launches if id(one) not in graphed}
    assert len(in_graphs) >= 40
    assert {repr(resources.source_of(one)) for one in in_graphs} - known == set()


def test_a_loaded_state_or_a_frozen_parameter_is_another_step(device: str) -> None:
    flow = flow_on(device)
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, graphs=True)
    x = batches(device, [4])[0]
    for _ in range(3):
        step(x)
    assert step._graphs is not None and step._graphs.forward(x) is not None
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert step._graphs.forward(x) is None, "its moments lie elsewhere"
    step(x)
    assert step._graphs.forward(x) is not None
    frozen = next(flow.parameters()).requires_grad_(False)
    before = frozen.detach().clone()
    for _ in range(3):
        step(x)
    assert torch.equal(frozen, before)


@on_gpu
def test_a_skipped_step_leaves_everything() -> None:
    flow = flow_on("cuda")
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, fastmaf.Guards(max_loss_jump=1.0), graphs=True)
    for x in batches("cuda", [4, 4, 4]):
        step(x)
    before = [p.detach().clone() for p in flow.parameters()]
    counts = [float(s["step"]) for s in optimizer.state.values()]
    assert step(100 * batches("cuda", [4])[0]).skipped
    with pytest.raises(fastmaf.NonFiniteLossError):
        step(torch.full((4, 13), float("nan"), device="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(flow.parameters(), before, strict=True))
    assert counts == [float(s["step"]) for s in optimizer.state.values()] == [3.0] * len(counts)
    assert not step(batches("cuda", [4])[0]).skipped


def test_a_flow_with_other_parameters_is_trained_without(device: str) -> None:
    flow = flow_on(device)
    extra = torch.nn.Parameter(torch.ones(13, device=device))
    optimizer = fastmaf.optim.FusedAdam([*flow.parameters(), extra], lr=1e-2)
    log_prob = flow.log_prob
    flow.log_prob = lambda x: log_prob(x * extra)  # type: ignore[method-assign]
    step = fastmaf.TrainingStep(flow, optimizer, graphs=True)
    x = batches(device, [4])[0]
    step(x)
    with pytest.warns(UserWarning, match="not replayed"):
        step(x)
    losses = [step(x).nll for _ in range(3)]
    assert losses[2] < losses[0], "steps taken without graphs do not train"
    assert not torch.equal(extra, torch.ones_like(extra))


@on_gpu
def test_a_clipped_step_of_parameters_that_the_kernel_cannot_take_is_taken_without() -> None:
    """The kernel walks memory in its order: of a transposed parameter that is not the gradient's."""
    flow = flow_on("cuda")
    extra = torch.nn.Parameter(torch.ones(2, 13, device="cuda").t())
    optimizer = fastmaf.optim.FusedAdam([*flow.parameters(), extra], lr=1e-2)
    log_prob = flow.log_prob
    flow.log_prob = lambda x: log_prob(x * extra[:, 0])  # type: ignore[method-assign]
    step = fastmaf.TrainingStep(flow, optimizer, fastmaf.Guards(max_grad_norm=1e9), graphs=True)
    x = batches("cuda", [4])[0]
    step(x)
    with pytest.warns(UserWarning, match="not contiguous"):
        step(x)
    assert torch.equal(extra[:, 1], torch.ones(13, device="cuda")), "no gradient reaches this column"


def test_steps_follow_buffers_hooks_and_amsgrad(device: str) -> None:
    """Each of them needs a step without graphs first, and hooks never have any."""
    flow = fastmaf.MAF(13, 1, (9,), whitening=3, seed=0).to(device)
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, graphs=True)
    x = batches(device, [8])[0]
    graphed = step._graphs
    assert graphed is not None
    step(x)
    step(x)
    assert graphed.forward(x) is not None
    next(t for t in flow.transforms if isinstance(t, fastmaf.GaussianWhitening)).fit_(x)
    assert graphed.forward(x) is None
    step(x)
    assert graphed.forward(x) is not None
    calls: list[int] = []
    handle = optimizer.register_step_post_hook(lambda *_: calls.append(1))
    assert graphed.forward(x) is None
    step(x)
    handle.remove()
    handle = flow.transforms[0].register_forward_hook(lambda *_: calls.append(2))
    assert graphed.forward(x) is None
    step(x)
    handle.remove()
    assert calls == [1, 2]
    assert graphed.forward(x) is not None
    handle = next(flow.parameters()).register_hook(lambda grad: calls.append(3))
    assert graphed.forward(x) is None
    step(x)
    handle.remove()
    assert calls == [1, 2, 3]
    optimizer.param_groups[0]["amsgrad"] = True
    assert graphed.forward(x) is None


@on_gpu
def test_an_old_graph_of_autograd_is_refused_after_a_replay() -> None:
    flow = flow_on("cuda")
    step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters()), graphs=True)
    (x,) = batches("cuda", [4])
    for _ in range(2):
        step(x)
    old = flow.log_prob(x).mean()
    step(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


@pytest.mark.slow
@pytest.mark.usefixtures("triton", "run_again")
def test_the_optimiser_is_looked_at_while_the_forward_pass_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes to look at its state does not keep a GPU waiting; a changed one is seen before the step."""
    from fastmaf.training.graph_keys import KeptState

    flow, x = flow_on("cpu"), batches("cpu", [4])[0]
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, graphs=True)
    for _ in range(3):
        step(x)
    calls: list[str] = []
    get, forward = KeptState.get, graphed_step.GraphedStep.forward
    assert step._graphs is not None
    of_optimizer = step._graphs._state

    def noted_get(state: KeptState) -> Any:
        if state is of_optimizer:
            calls.append("state")
        return get(state)

    def noted_forward(graphed: graphed_step.GraphedStep, x: torch.Tensor) -> None:
        calls.append("forward")
        forward(graphed, x)

    monkeypatch.setattr(KeptState, "get", noted_get)
    monkeypatch.setattr(graphed_step.GraphedStep, "forward", noted_forward)
    step(x)
    assert calls == ["forward", "state"]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    calls.clear()
    before = [parameter.detach().clone() for parameter in flow.parameters()]
    report = step(x)
    assert calls[:2] == ["forward", "state"] and not report.skipped
    assert not any(torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))
