"""FusedAdam beside others: torch's optimisers, frozen layers, other modules, other uses of the weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastmaf
from fastmaf.training.fused_adam import FusedAdam
from tests.training.test_fused_adam import WAYS, D, assert_same, assert_same_state, batch, loss_of, pair, take_step

pytestmark = pytest.mark.usefixtures("backend")


def take_steps(flow: fastmaf.MAF, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        optimizer.zero_grad()
        loss_of(flow, i).backward()
        optimizer.step()


@pytest.mark.parametrize("first, second", [(FusedAdam, torch.optim.Adam), (torch.optim.Adam, FusedAdam)])
def test_either_goes_on_from_the_others_state(first: Any, second: Any) -> None:
    flow, plain = pair()
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2, weight_decay=0.1)
    take_steps(plain, adam, range(8))
    start = first(flow.parameters(), lr=1e-2, weight_decay=0.1)
    take_steps(flow, start, range(4))
    state = copy.deepcopy(start.state_dict())
    rest = second(flow.parameters())
    rest.load_state_dict(state)
    take_steps(flow, rest, range(4, 8))
    assert_same(flow, plain)
    assert_same_state(rest, adam)


def test_minimize_goes_on_from_a_loaded_state() -> None:
    flow, plain = pair()
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2)
    take_steps(plain, adam, range(3))
    flow.load_state_dict(plain.state_dict())
    fused = FusedAdam(flow.parameters())
    fused.load_state_dict(copy.deepcopy(adam.state_dict()))
    take_steps(plain, adam, range(3, 6))
    for i in range(3, 6):
        fused.zero_grad()
        fused.minimize(loss_of(flow, i))
    assert_same(flow, plain)


def two_flows_of_one_layer() -> Any:
    """Two flows that share their blocks' first layer."""
    first, second = fastmaf.MAF(D, 2, (7, 5), seed=1), fastmaf.MAF(D, 2, (7, 5), seed=1)
    second.transforms[0].made.hidden[0] = first.transforms[0].made.hidden[0]
    return nn.ModuleList([first, second]).double()


LOSSES: dict[str, Any] = {
    "two batches": lambda flow, i: loss_of(flow, i) + 0.5 * loss_of(flow, i + 10),
    "forward and inverse": lambda flow, i: loss_of(flow, i) + flow.inverse(batch(i + 20))[0].square().mean(),
    "weight penalty": lambda flow, i: loss_of(flow, i) + sum(p.square().sum() for p in flow.parameters()),
    "penalty on one": lambda flow, i: loss_of(flow, i) + next(flow.parameters()).square().sum(),
    "layer by layer": lambda flow, i: flow.nll_per_dim(batch(i)).mean(),
    "checkpointed": lambda flow, i: -checkpoint(flow.log_prob, batch(i), use_reentrant=False).mean(),
    "checkpointed, reentrant": lambda flow, i: -checkpoint(
        flow.log_prob, batch(i).requires_grad_(), use_reentrant=True
    ).mean(),
    "half checkpointed": lambda flow, i: loss_of(flow, i)
    - checkpoint(flow.log_prob, batch(i), use_reentrant=False).mean(),
}  # fmt: skip


@pytest.mark.parametrize("limit", [None, 0.1])
@pytest.mark.parametrize("name", LOSSES)
def test_minimize_of_any_loss_is_the_step_of_adam(name: str, limit: float | None) -> None:
    """Weights that take part in it more than once, or in ways that no gradient sink sees, get stored gradients."""
    flow, plain = pair()
    loss = LOSSES[name]
    fused, adam = (kind(f.parameters(), lr=1e-2, eps=1.0) for kind, f in ((FusedAdam, flow), (torch.optim.Adam, plain)))
    for i in range(3):
        assert fused.minimize(loss(flow, i), limit)
        adam.zero_grad()
        loss(plain, i).backward()
        if limit is not None:
            norm = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
            for p in plain.parameters():
                p.grad *= min(1.0, limit / float(norm))
        adam.step()
    assert_same(flow, plain)
    assert_same_state(fused, adam)
    assert all(p.grad is None for p in flow.parameters())


def test_minimize_with_parameters_that_two_flows_share() -> None:
    flows = two_flows_of_one_layer()
    plain = copy.deepcopy(flows)
    assert plain[0].transforms[0].made.hidden[0] is plain[1].transforms[0].made.hidden[0]
    fused, adam = FusedAdam(flows.parameters(), lr=1e-2), torch.optim.Adam(plain.parameters(), lr=1e-2)
    for i in range(3):
        fused.minimize(loss_of(flows[0], i) + loss_of(flows[1], i))
        adam.zero_grad()
        (loss_of(plain[0], i) + loss_of(plain[1], i)).backward()
        adam.step()
    assert_same(flows, plain)


@pytest.mark.parametrize("way", WAYS)
def test_an_old_graph_is_refused_after_the_step(way: str) -> None:
    """The weights that it saved are no longer there."""
    flow, _ = pair()
    optimizer = FusedAdam(flow.parameters())
    old = loss_of(flow, 0)
    take_step(flow, optimizer, loss_of(flow, 1), way)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


@pytest.mark.parametrize("way", WAYS)
def test_frozen_layers_are_untouched(way: str) -> None:
    flow, plain = pair()
    for model in (flow, plain):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("hidden.0" not in name)
    frozen = {n: p.detach().clone() for n, p in flow.named_parameters() if not p.requires_grad}
    assert frozen
    fused = FusedAdam(flow.parameters(), weight_decay=0.1)
    adam = torch.optim.Adam(plain.parameters(), weight_decay=0.1)
    take_steps(plain, adam, range(4))
    for i in range(4):
        take_step(flow, fused, loss_of(flow, i), way)
    assert all(torch.equal(p, frozen[n]) for n, p in flow.named_parameters() if n in frozen)
    assert_same(flow, plain)


@pytest.mark.parametrize("way", WAYS)
def test_other_modules_are_updated_as_by_adam(way: str) -> None:
    flow, plain = pair()
    models = [nn.ModuleList([f, nn.Linear(D, D, dtype=torch.float64)]) for f in (flow, plain)]
    models[1][1].load_state_dict(models[0][1].state_dict())
    start = copy.deepcopy(models[0])
    fused, adam = FusedAdam(models[0].parameters(), lr=1e-2), torch.optim.Adam(models[1].parameters(), lr=1e-2)
    for i in range(5):
        for (model, linear), optimizer in zip(models, (fused, adam), strict=True):
            take_step(model, optimizer, -model.log_prob(linear(batch(i))).mean(), way)
    assert_same(models[0], models[1], start)
    assert not torch.equal(models[0][1].weight, start[1].weight)


def test_two_optimisers_over_the_same_weights() -> None:
    flow, plain = pair()
    for model, kind in ((flow, FusedAdam), (plain, torch.optim.Adam)):
        first, second = kind(model.parameters(), lr=1e-2), torch.optim.SGD(model.parameters(), lr=1e-3)
        kind(model.parameters())  # a third, which is never used
        for i in range(3):
            for optimizer in (first, second):
                optimizer.zero_grad()
                loss_of(model, i).backward()
                optimizer.step()
    assert_same(flow, plain)


def test_autograd_grad_finds_every_gradient() -> None:
    flow, plain = pair()
    optimizer = FusedAdam(flow.parameters())
    optimizer.minimize(loss_of(flow, 0))
    plain.load_state_dict(flow.state_dict())
    own = torch.autograd.grad(loss_of(flow, 1), list(flow.parameters()))
    expected = torch.autograd.grad(loss_of(plain, 1), list(plain.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


def test_gradients_are_those_without_it() -> None:
    """What the flow's own zero_grad forgets is forgotten, and what torch clips is clipped."""
    flow, plain = pair()
    fused, adam = FusedAdam(flow.parameters(), eps=1.0), torch.optim.Adam(plain.parameters(), eps=1.0)
    for model, optimizer in ((flow, fused), (plain, adam)):
        loss_of(model, 0).backward()
        model.zero_grad()
        optimizer.step()
        assert not optimizer.state
        loss_of(model, 1).backward()
        assert float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)) > 1
        loss_of(model, 2).backward()
        optimizer.step()
    assert_same(flow, plain)


@pytest.mark.parametrize("way", WAYS)
def test_beside_another_optimiser_over_the_other_blocks(way: str) -> None:
    flow, expected = pair(blocks=3, order="natural")
    reference = torch.optim.Adam(expected.parameters(), lr=1e-2)
    own = list(flow.transforms[1].parameters())
    fused = FusedAdam(own, lr=1e-2)
    other = torch.optim.Adam([p for p in flow.parameters() if all(p is not q for q in own)], lr=1e-2)
    for i in range(4):
        other.zero_grad()
        if way == "step":
            take_steps(flow, fused, range(i, i + 1))
        else:
            fused.minimize(loss_of(flow, i), math.inf if way == "clip" else None)
        other.step()
        reference.zero_grad()
        loss_of(expected, i).backward()
        reference.step()
    assert_same(flow, expected)
