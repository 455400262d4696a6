"""FusedAdam beside others: torch's optimisers, frozen layers, other modules, copies, and what it refuses."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

import fastmaf
from fastmaf.optim import FusedAdam
from tests.core.helpers import layers_of
from tests.test_optim import D, assert_same, assert_same_state, batch, loss_of, no_weight_has_a_gradient, pair

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
    del start
    gc.collect()
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


def test_minimize_refuses_a_weight_that_is_used_twice() -> None:
    flow, _ = pair()
    optimizer = FusedAdam(flow.parameters())
    # Autograd may be the first to notice: the second use has saved a weight that the first has updated.
    with pytest.raises(RuntimeError, match="twice|modified by an inplace operation"):
        optimizer.minimize(loss_of(flow, 0) + loss_of(flow, 1))
    optimizer.zero_grad()
    optimizer.minimize(loss_of(flow, 0))  # it goes on


def test_minimize_refuses_gradients_that_wait() -> None:
    flow, plain = pair()
    optimizer = FusedAdam(flow.parameters())
    loss_of(flow, 0).backward()
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.minimize(loss_of(flow, 1))
    assert_same(flow, plain)
    optimizer.zero_grad()
    optimizer.minimize(loss_of(flow, 1))


@pytest.mark.parametrize("way", ["step", "minimize"])
def test_an_old_graph_is_refused_after_the_step(way: str) -> None:
    """The weights that it saved are no longer there."""
    flow, _ = pair()
    optimizer = FusedAdam(flow.parameters())
    old = loss_of(flow, 0)
    if way == "minimize":
        optimizer.minimize(loss_of(flow, 1))
    else:
        take_steps(flow, optimizer, range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


@pytest.mark.parametrize("way", ["step", "minimize"])
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
        fused.zero_grad()
        if way == "minimize":
            fused.minimize(loss_of(flow, i))
        else:
            take_steps(flow, fused, range(i, i + 1))
    assert all(torch.equal(p, frozen[n]) for n, p in flow.named_parameters() if n in frozen)
    assert_same(flow, plain)


@pytest.mark.parametrize("way", ["step", "minimize"])
def test_other_modules_are_updated_as_by_adam(way: str) -> None:
    flow, plain = pair()
    models = [nn.ModuleList([f, nn.Linear(D, D, dtype=torch.float64)]) for f in (flow, plain)]
    models[1][1].load_state_dict(models[0][1].state_dict())
    start = copy.deepcopy(models[0])
    fused, adam = FusedAdam(models[0].parameters(), lr=1e-2), torch.optim.Adam(models[1].parameters(), lr=1e-2)
    for i in range(5):
        for (model, linear), optimizer in zip(models, (fused, adam), strict=True):
            optimizer.zero_grad()
            loss = -model.log_prob(linear(batch(i))).mean()
            if way == "minimize" and optimizer is fused:
                fused.minimize(loss)
            else:
                loss.backward()
                optimizer.step()
    assert_same(models[0], models[1], start)
    assert not torch.equal(models[0][1].weight, start[1].weight)


def test_a_copy_of_the_flow_is_none_of_its_business() -> None:
    flow, plain = pair()
    fused = FusedAdam(flow.parameters())
    twin = copy.deepcopy(flow)
    take_steps(twin, torch.optim.Adam(twin.parameters()), range(3))
    take_steps(plain, torch.optim.Adam(plain.parameters()), range(3))
    assert_same(twin, plain)
    loss_of(twin, 5).backward()
    assert all(layer.weight.grad is not None for layer in layers_of(twin).values())
    take_steps(flow, fused, range(3))
    assert_same(flow, plain)


def test_weights_get_gradients_again_when_it_is_gone() -> None:
    flow, plain = pair()
    optimizer = FusedAdam(flow.parameters())
    loss_of(flow, 0).backward()
    assert no_weight_has_a_gradient(flow)
    del optimizer
    gc.collect()
    flow.zero_grad()
    loss_of(flow, 0).backward()
    loss_of(plain, 0).backward()
    for own, other in zip(flow.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None and torch.equal(own.grad, other.grad)


def test_a_gradient_that_arrives_in_grad_counts_too() -> None:
    """Gradients through the inverse come whole; they add to those kept as factors."""
    flow, plain = pair()
    fused, adam = FusedAdam(flow.parameters(), lr=1e-2), torch.optim.Adam(plain.parameters(), lr=1e-2)
    for i in range(3):
        for model, optimizer in ((flow, fused), (plain, adam)):
            optimizer.zero_grad()
            (loss_of(model, i) + model.inverse(batch(i + 20))[0].square().mean()).backward()
            optimizer.step()
    assert_same(flow, plain)


def test_minimize_with_a_gradient_that_arrives_in_grad() -> None:
    """A loss that reads the weights in both ways takes one step with the whole gradient, or is refused."""
    flow, plain = pair()
    fused, adam = FusedAdam(flow.parameters(), lr=1e-2), torch.optim.Adam(plain.parameters(), lr=1e-2)

    def loss(model: fastmaf.MAF) -> torch.Tensor:
        return loss_of(model, 0) + model.inverse(batch(20))[0].square().mean()

    loss(plain).backward()
    adam.step()
    try:
        fused.minimize(loss(flow))
    except RuntimeError:
        return
    assert_same(flow, plain)
    assert all(int(state["step"]) == 1 for state in fused.state.values())


def test_the_last_of_two_optimisers_takes_the_gradients() -> None:
    flow, plain = pair()
    first = FusedAdam(flow.parameters())
    second = FusedAdam(flow.parameters())
    take_steps(flow, second, range(2))
    take_steps(plain, torch.optim.Adam(plain.parameters()), range(2))
    assert_same(flow, plain)
    assert not first.state


@pytest.mark.parametrize("way", ["step", "minimize"])
def test_beside_another_optimiser_over_the_other_blocks(way: str) -> None:
    flow, expected = pair(blocks=3, order="natural")
    reference = torch.optim.Adam(expected.parameters(), lr=1e-2)
    own = list(flow.transforms[1].parameters())
    fused = FusedAdam(own, lr=1e-2)
    other = torch.optim.Adam([p for p in flow.parameters() if all(p is not q for q in own)], lr=1e-2)
    for i in range(4):
        other.zero_grad()
        if way == "minimize":
            fused.minimize(loss_of(flow, i))
        else:
            fused.zero_grad()
            loss_of(flow, i).backward()
            fused.step()
        other.step()
        reference.zero_grad()
        loss_of(expected, i).backward()
        reference.step()
    assert_same(flow, expected)
