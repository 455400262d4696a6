"""The step of a group by torch's fused kernel: the same numbers and state as ``torch.optim.Adam``, hooks and all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastmaf.optim import FusedAdam
from fastmaf.training import cpu_step

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True, "betas": (0.5, 0.9), "eps": 1e-3},
    "amsgrad": {"amsgrad": True},
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((7,), (3, 5), (1,), ())]


def draw_grads(parameters: list[nn.Parameter], seed: int, missing: int | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(parameters):
        p.grad = None if i == missing else torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizers = (
        FusedAdam(ours, lr=1e-2, **OPTIONS[name]),
        torch.optim.Adam(theirs, lr=1e-2, fused=True, **OPTIONS[name]),
    )
    for seed in range(6):
        for own, optimizer in zip((ours, theirs), optimizers, strict=True):
            draw_grads(own, seed, missing=seed % 5)
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + seed)
            versions = [p._version for p in own]
            optimizer.step()
            if own is ours:
                assert [p._version - v for p, v in zip(own, versions, strict=True)] == [
                    int(p.grad is not None) for p in own
                ]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for key, value in optimizers[1].state[b].items():
            assert torch.equal(optimizers[0].state[a][key], value), key


def test_the_state_of_torch_s_other_kernels_is_taken_over() -> None:
    ours, theirs = parameters(), parameters()
    before, optimizer = torch.optim.Adam(theirs, lr=1e-2, foreach=False), FusedAdam(ours, lr=1e-2)
    for seed in range(3):
        draw_grads(theirs, seed)
        before.step()
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
    optimizer.param_groups[0].update(foreach=None, fused=True)  # the loaded state chose otherwise
    for seed in range(3, 6):
        for own, each in ((ours, optimizer), (theirs, before)):
            draw_grads(own, seed)
            each.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert int(optimizer.state[a]["step"]) == 6


def test_only_usual_groups_are_stepped_here(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    step = cpu_step.step_on_cpu_
    monkeypatch.setattr("fastmaf.training.fused_adam.step_on_cpu_", lambda *a: taken.append(step(*a)) or taken[-1])

    def takes(grads: Any = None, **options: Any) -> bool:
        own = parameters()
        optimizer = FusedAdam(own, lr=1e-2, **options)
        for seed in range(2):
            taken.clear()
            draw_grads(own, seed)
            if grads is not None:
                grads(own)
            optimizer.step()
        return any(taken)

    assert takes() and takes(weight_decay=0.1)
    assert not takes(amsgrad=True) and not takes(foreach=True) and not takes(fused=False)
    assert not takes(lambda own: setattr(own[1], "grad", torch.randn(5, 3).t())), "strided"


def test_hooks_run_once_and_a_scheduler_sees_the_step() -> None:
    own, calls = parameters(), []
    optimizer = FusedAdam(own, lr=1e-2)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for seed in range(2):
        draw_grads(own, seed)
        assert optimizer.step(lambda: calls.append("closure") or 3.0) == 3.0
        scheduler.step()
    assert calls == ["before", "closure", "after"] * 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-2)


def test_a_scaled_step_that_is_not_finite_is_skipped() -> None:
    own = parameters()
    optimizer = FusedAdam(own, lr=1e-2)
    draw_grads(own, 0)
    optimizer.step()
    before = [p.detach().clone() for p in own]
    draw_grads(own, 1)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert all(map(torch.equal, before, own))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not any(map(torch.equal, before, own))


def test_tracing_a_step_takes_none() -> None:
    def run(compiled: bool) -> list[nn.Parameter]:
        own = parameters()
        optimizer = FusedAdam(own, lr=1e-2)
        compiled_step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for seed in range(4):
            draw_grads(own, seed)
            (optimizer.step if seed < 2 else compiled_step)()
        assert {int(optimizer.state[p]["step"]) for p in own} == {4}
        return own

    for a, b in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_gradients_are_removed_or_set_to_zero() -> None:
    own = parameters()
    optimizer = FusedAdam([{"params": own[:2]}, {"params": own[2:], "lr": 0.1}])
    draw_grads(own, 0, missing=1)
    optimizer.zero_grad(set_to_none=False)
    assert [p.grad is None for p in own] == [False, True, False, False]
    assert not any(p.grad.any() for p in own if p.grad is not None)
    optimizer.zero_grad()
    assert all(p.grad is None for p in own)
