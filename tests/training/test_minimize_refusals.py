"""What FusedAdam.minimize refuses: before anything is changed, to the bit, and training can go on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf import NonFiniteLossError
from fastmaf.training.fused_adam import FusedAdam
from tests.training.test_fused_adam import D, assert_same, assert_same_state, batch, loss_of, pair

pytestmark = pytest.mark.usefixtures("backend")

Case = tuple[Callable[[Any, Any], object], type[Exception], str]


def spoilt(value: float, rows: int = 16) -> Tensor:
    x = batch(5, rows)
    x[0, 3] = value
    return x


def nll(flow: Any, x: Tensor) -> Tensor:
    return -flow.log_prob(x).mean()


def waiting(flow: Any, optimizer: Any) -> None:
    loss_of(flow, 1).backward()
    try:
        optimizer.minimize(loss_of(flow, 2))
    finally:
        optimizer.zero_grad()


def nested(flow: Any, optimizer: Any) -> None:
    loss, second, other = loss_of(flow, 1), loss_of(flow, 2), FusedAdam(flow.parameters())

    def minimize_second(_: Tensor) -> None:
        other.minimize(second)

    loss.register_hook(minimize_second)
    try:
        optimizer.minimize(loss)
    finally:
        assert not other.state


def scaled(flow: Any, optimizer: Any) -> None:
    optimizer.minimize(torch.amp.GradScaler("cpu", init_scale=4096.0).scale(loss_of(flow, 1)))


def failing(flow: Any, optimizer: Any) -> None:
    def fail(grad: Tensor) -> None:
        raise MemoryError("no memory left")

    loss = loss_of(flow, 1)
    loss.register_hook(fail)
    optimizer.minimize(loss)


CASES: dict[str, Case] = {
    "NaN data": (lambda f, o: o.minimize(nll(f, spoilt(math.nan))), NonFiniteLossError, "became nan"),
    "infinite data": (lambda f, o: o.minimize(nll(f, spoilt(math.inf))), NonFiniteLossError, "became (nan|inf)"),
    "huge data": (lambda f, o: o.minimize(nll(f, spoilt(1e200))), NonFiniteLossError, "became (nan|inf)"),
    "NaN, clipped": (lambda f, o: o.minimize(nll(f, spoilt(math.nan)), 1.0), NonFiniteLossError, "became nan"),
    "empty batch": (lambda f, o: o.minimize(nll(f, batch(1)[:0])), NonFiniteLossError, "became nan"),
    "a vector": (lambda f, o: o.minimize(-f.log_prob(batch(1))), ValueError, r"scalar.*found torch\.float64 \[16\]"),
    "a number": (lambda f, o: o.minimize(1.5), ValueError, "scalar.*found float"),
    "complex": (lambda f, o: o.minimize(loss_of(f, 1) * 1j), ValueError, "scalar.*found torch.complex128"),
    "detached": (lambda f, o: o.minimize(loss_of(f, 1).detach()), ValueError, "require grad"),
    "gradients wait": (waiting, RuntimeError, r"waiting.*zero_grad\(\)"),
    "scaled": (scaled, RuntimeError, r"GradScaler.*scaler\.step\(optimizer\)"),
    "norm 0": (lambda f, o: o.minimize(loss_of(f, 1), 0.0), ValueError, r"max_grad_norm must be positive.*found 0\.0"),
    "norm -1": (lambda f, o: o.minimize(loss_of(f, 1), -1.0), ValueError, "found -1"),
    "norm NaN": (lambda f, o: o.minimize(loss_of(f, 1), math.nan), ValueError, "found nan"),
    "nested": (nested, RuntimeError, r"another minimize\(\)"),
    "error at once": (failing, MemoryError, "no memory left"),
}


def snapshot(flow: Any, optimizer: Any) -> tuple[list[Tensor], Any]:
    return [p.detach().clone() for p in flow.parameters()], copy.deepcopy(optimizer.state_dict())


def assert_unchanged(flow: Any, optimizer: Any, before: tuple[list[Tensor], Any]) -> None:
    parameters, state = snapshot(flow, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before[0], strict=True))
    assert state["param_groups"] == before[1]["param_groups"] and state["state"].keys() == before[1]["state"].keys()
    for key, tensors in state["state"].items():
        assert all(torch.equal(value, before[1]["state"][key][name]) for name, value in tensors.items())
    assert all(p.grad is None and not hasattr(p, "_gradient_sink") for p in flow.parameters())


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_what_is_refused_changes_nothing(name: str, steps: int) -> None:
    run, error, words = CASES[name]
    flow, plain = pair()
    flow.validate_args = False  # else log_prob refuses such data itself, and minimize never sees their loss
    fused, adam = FusedAdam(flow.parameters(), lr=1e-2), torch.optim.Adam(plain.parameters(), lr=1e-2)
    for i in range(steps + 2):
        if i == steps:
            before = snapshot(flow, fused)
            with pytest.raises(error, match=words):
                run(flow, fused)
            assert_unchanged(flow, fused, before)
        fused.minimize(loss_of(flow, i))
        adam.zero_grad()
        loss_of(plain, i).backward()
        adam.step()
    assert_same(flow, plain)
    assert_same_state(fused, adam)


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, _ = pair()
    optimizer = FusedAdam(flow.parameters())
    before = snapshot(flow, optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(RuntimeError, match=r"3 processes.*loss\.backward\(\)"):
        optimizer.minimize(loss_of(flow, 0))
    with pytest.raises(RuntimeError, match="3 processes"):
        fastmaf.TrainingStep(flow, optimizer)(batch(0))
    assert_unchanged(flow, optimizer, before)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert optimizer.minimize(loss_of(flow, 0))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_takes_no_step(value: float) -> None:
    flow, _ = pair()
    optimizer = FusedAdam(flow.parameters())
    optimizer.minimize(loss_of(flow, 0))
    before = snapshot(flow, optimizer)
    loss = loss_of(flow, 1)
    loss.register_hook(lambda grad: grad * value)
    assert not optimizer.minimize(loss, math.inf)
    assert_unchanged(flow, optimizer, before)
    assert optimizer.minimize(loss_of(flow, 1), math.inf)


def test_a_constant_of_the_user_is_no_scale() -> None:
    flow, plain = pair()
    fused, adam = FusedAdam(flow.parameters(), eps=1.0), torch.optim.Adam(plain.parameters(), eps=1.0)
    for factor in (0.5, 4096.0, torch.tensor(3.0), torch.tensor(0.25), torch.tensor(2.0, dtype=torch.float64)):
        fused.minimize(factor * loss_of(flow, 0) if isinstance(factor, float) else loss_of(flow, 0) * factor)
        adam.zero_grad()
        (loss_of(plain, 0) * factor).backward()
        adam.step()
    assert_same(flow, plain)


def test_a_loss_can_be_minimised_once() -> None:
    flow, _ = pair()
    optimizer = FusedAdam(flow.parameters())
    loss = loss_of(flow, 0)
    optimizer.minimize(loss)
    before = snapshot(flow, optimizer)
    with pytest.raises(RuntimeError, match="second time|freed"):
        optimizer.minimize(loss)
    assert_unchanged(flow, optimizer, before)


def test_copies_made_during_a_backward_pass_have_no_sink() -> None:
    flow, _ = pair()
    optimizer = FusedAdam(flow.parameters())
    loss, copies = loss_of(flow, 0), []
    loss.register_hook(lambda _: copies.append(copy.deepcopy(flow)))
    optimizer.minimize(loss)
    (twin,) = copies
    assert not any(hasattr(p, "_gradient_sink") for p in twin.parameters())
    (-twin.log_prob(torch.zeros(2, D, dtype=torch.float64)).mean()).backward()
    assert all(p.grad is not None for p in twin.parameters())
