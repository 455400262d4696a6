"""Training steps: they learn, and the guards do what they say, to the bit."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf import Guards, TrainingStep

D = 24


def build(**options: Any) -> fastmaf.MAF:
    return fastmaf.MAF(D, 2, (16, 16), seed=0, **options)


def walks(n: int, seed: int = 0) -> Tensor:
    """Random walks in [-1, 1] or so: data whose dimensions depend on those before."""
    steps = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return steps.cumsum(dim=1) / D


def sgd(flow: fastmaf.Flow, lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD(flow.parameters(), lr=lr)


def flat(flow: fastmaf.Flow) -> Tensor:
    return torch.cat([p.detach().clone().flatten() for p in flow.parameters()])


def gradient(flow: fastmaf.Flow, x: Tensor) -> Tensor:
    """Gradient of the mean NLL in nats."""
    grads = torch.autograd.grad(-flow.log_prob(x).mean(), list(flow.parameters()))
    return torch.cat([g.flatten() for g in grads])


def test_steps_lower_the_nll_of_data_they_have_not_seen() -> None:
    flow, other = build(), walks(64, seed=1)
    step = TrainingStep(flow, torch.optim.Adam(flow.parameters(), lr=3e-3))
    before = float(-flow.log_prob(other).mean().detach())
    reports = [step(walks(16, seed=10 + i)) for i in range(60)]
    after = float(-flow.log_prob(other).mean().detach())
    assert after < before - 0.3 * D
    assert reports[-1].nll < reports[0].nll - 0.3 * D
    assert not any(report.skipped for report in reports)
    assert step.steps == 60


def test_a_step_without_guards_is_a_plain_step() -> None:
    flow, plain = build(), build()
    step = TrainingStep(flow, torch.optim.Adam(flow.parameters(), lr=1e-3))
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    for i in range(4):
        x = walks(8, seed=i)
        optimizer.zero_grad()
        loss = -plain.log_prob(x).mean()
        loss.backward()
        optimizer.step()
        assert step(x) == (float(loss.detach()), False)
    assert torch.equal(flat(flow), flat(plain))


def test_warm_up_raises_every_learning_rate_step_by_step() -> None:
    flow = build()
    first, *others = flow.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.4}, {"params": others, "lr": 0.1}])
    step = TrainingStep(flow, optimizer, Guards(warmup_steps=4))
    rates = []
    for i in range(6):
        step(0.1 * walks(4, seed=i))
        rates.append([group["lr"] for group in optimizer.param_groups])
    share = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates == [pytest.approx([0.4 * s, 0.1 * s]) for s in share]


def test_the_first_warm_up_step_moves_by_its_share() -> None:
    flow, x = build(dtype=torch.float64), walks(4).double()
    before, slope = flat(flow), gradient(flow, x)
    TrainingStep(flow, sgd(flow, lr=1e-3), Guards(warmup_steps=5))(x)
    torch.testing.assert_close(flat(flow) - before, -1e-3 / 5 * slope, rtol=1e-9, atol=1e-15)


def test_gradients_are_clipped_to_the_norm_of_the_loss_per_dimension() -> None:
    flow, x = build(dtype=torch.float64), walks(4).double()
    before, slope = flat(flow), gradient(flow, x)
    limit = float(slope.norm()) / D / 3  # a third of what there is
    TrainingStep(flow, sgd(flow), Guards(max_grad_norm=limit))(x)
    moved = flat(flow) - before
    assert float(moved.norm()) / D == pytest.approx(limit, rel=1e-9)
    torch.testing.assert_close(moved, -slope / 3, rtol=1e-9, atol=1e-15)


def test_gradients_below_the_limit_are_left_alone() -> None:
    clipped, free, x = build(), build(), walks(4)
    limit = 1.01 * float(gradient(free, x).norm()) / D
    TrainingStep(clipped, sgd(clipped, 1e-3), Guards(max_grad_norm=limit))(x)
    TrainingStep(free, sgd(free, 1e-3))(x)
    assert torch.equal(flat(clipped), flat(free))


def test_the_limit_does_not_depend_on_how_the_loss_scales_with_the_dimensions() -> None:
    """The same dimensions twice over have twice the gradient of the sum, and the same of the loss per dimension."""
    moved = []
    for repeats in (1, 4):
        # No hidden connections matter with an identity start: every dimension moves its own biases alone.
        flow = fastmaf.MAF(D * repeats, 1, (8,), seed=0, order="natural", init="identity", log_scale_bound=None)
        x = torch.full((2, D * repeats), 0.5)
        before = flat(flow)
        TrainingStep(flow, sgd(flow), Guards(max_grad_norm=1e-3))(x)
        moved.append(float((flat(flow) - before).norm()) / (D * repeats))
    assert moved == pytest.approx([1e-3, 1e-3], rel=1e-4)


def test_a_leaping_batch_changes_nothing() -> None:
    flow = build()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    step = TrainingStep(flow, optimizer, Guards(max_loss_jump=0.5))
    for i in range(5):
        assert not step(walks(8, seed=i)).skipped
    before = flat(flow)
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    report = step(1000 * walks(8))
    assert report.skipped
    assert report.nll > 1000 * D
    assert torch.equal(flat(flow), before)
    after = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
    assert not step(walks(8)).skipped, "the batch after the poisoned one is an ordinary one"
    assert not torch.equal(flat(flow), before)


def test_a_smaller_rise_than_the_leap_is_taken_and_a_larger_one_is_not() -> None:
    for factor, skipped in ((1.05, True), (0.95, False)):
        flow = build()
        low, high = walks(8), 3 * walks(8)
        gap = float((flow.log_prob(low).mean() - flow.log_prob(high).mean()).detach()) / D
        step = TrainingStep(flow, sgd(flow, lr=0.0), Guards(max_loss_jump=gap / factor))
        step(low)
        assert step(high).skipped is skipped


def test_a_loss_that_stays_high_is_accepted_in_the_end() -> None:
    flow, low, high = build(), walks(8), 3 * walks(8)
    gap = float((flow.log_prob(low).mean() - flow.log_prob(high).mean()).detach()) / D
    step = TrainingStep(flow, sgd(flow, lr=0.0), Guards(max_loss_jump=gap / 3))  # nothing moves but the running mean
    step(low)
    skipped = [step(high).skipped for _ in range(40)]
    # Each skipped step raises the running mean by a tenth of the limit: two limits take twenty steps.
    assert sum(skipped) in (20, 21)
    assert skipped == sorted(skipped, reverse=True), "once accepted, accepted for good"


def test_the_very_first_batch_is_never_a_leap() -> None:
    flow = build()
    assert not TrainingStep(flow, sgd(flow, 1e-9), Guards(max_loss_jump=1e-6))(100 * walks(4)).skipped


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("guards", [Guards(), Guards(warmup_steps=5, max_grad_norm=1.0, max_loss_jump=1.0)])
def test_a_loss_that_is_not_finite_raises_and_changes_nothing(value: float, guards: Guards) -> None:
    flow = build()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    step = TrainingStep(flow, optimizer, guards)
    step(walks(8))
    before, state, rates = flat(flow), step.state_dict(), [g["lr"] for g in optimizer.param_groups]
    moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
    bad = walks(8)
    bad[3, 5] = value
    with pytest.raises(fastmaf.NonFiniteLossError, match=r"NLL of a batch became (nan|inf) at step 2"):
        step(bad)
    assert torch.equal(flat(flow), before)
    assert step.state_dict() == state
    assert [g["lr"] for g in optimizer.param_groups] == rates
    after = [v for s in optimizer.state.values() for v in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
    assert math.isfinite(step(walks(8)).nll), "training can go on"


def test_a_step_leaves_the_value_checks_of_other_threads() -> None:
    flow, bad = build(), torch.full((1, D), math.nan)
    errors: list[str] = []

    def score() -> None:
        try:
            flow.log_prob(bad)
        except ValueError as error:
            errors.append(str(error))

    def within_a_step(*_: object) -> None:
        handle.remove()
        thread = threading.Thread(target=score)
        thread.start()
        thread.join()

    handle = flow.transforms[0].register_forward_hook(within_a_step)
    assert math.isfinite(TrainingStep(flow, sgd(flow, 1e-9))(walks(4)).nll)
    assert len(errors) == 1 and "x must be finite" in errors[0]


@pytest.mark.parametrize("kind", [torch.optim.Adam, fastmaf.optim.FusedAdam])
def test_gradients_of_parameters_without_an_optimiser_do_not_count_in_the_norm(kind: Any) -> None:
    """Nobody clears them: they add up from step to step."""
    steps = []
    for size in (0.0, 1e6):
        flow = build()
        frozen, *rest = flow.transforms
        for parameter in frozen.parameters():
            parameter.grad = torch.full_like(parameter, size)
        trained = [p for part in rest for p in part.parameters()]
        TrainingStep(flow, kind(trained, eps=1.0), Guards(max_grad_norm=1e-3))(walks(64))
        steps.append(flat(flow))
    assert torch.equal(*steps)
    assert not torch.equal(steps[0], flat(build()))


def test_non_finite_gradients_of_a_finite_loss_are_skipped() -> None:
    flow = build()
    step = TrainingStep(flow, sgd(flow), Guards(max_grad_norm=1.0))
    handle = next(flow.parameters()).register_hook(lambda grad: grad * math.inf)
    before = flat(flow)
    assert step(walks(4)).skipped
    assert torch.equal(flat(flow), before)
    handle.remove()
    assert not step(walks(4)).skipped


def test_a_step_restored_from_its_state_goes_on_as_if_nothing_had_happened() -> None:
    guards = Guards(warmup_steps=6, max_grad_norm=0.5, max_loss_jump=0.3)
    batches = [walks(8, seed=i) * (10 if i == 4 else 1) for i in range(8)]

    def fresh() -> tuple[fastmaf.MAF, torch.optim.SGD, TrainingStep]:
        flow = build()
        optimizer = sgd(flow, 1e-3)
        return flow, optimizer, TrainingStep(flow, optimizer, guards)

    flow, optimizer, step = fresh()
    reports = [step(x) for x in batches]
    assert [r.skipped for r in reports] == [i == 4 for i in range(8)], "the test wants one leap"

    first, _, begun = fresh()
    head = [begun(x) for x in batches[:3]]
    state = json.loads(json.dumps(begun.state_dict()))
    second, restored_optimizer, restored = fresh()
    second.load_state_dict(first.state_dict())
    restored.load_state_dict(state)
    assert head + [restored(x) for x in batches[3:]] == reports
    assert torch.equal(flat(second), flat(flow))
    assert restored_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert restored.state_dict() == step.state_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_steps": -1}, r"warmup_steps must be 0 or more; found -1"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm must be a positive number, or None for no limit; found 0\.0"),
        ({"max_grad_norm": math.nan}, r"max_grad_norm .* found nan"),
        ({"max_loss_jump": -0.5}, r"max_loss_jump .* found -0\.5"),
        ({"max_loss_jump": math.inf}, r"max_loss_jump .* found inf"),
    ],
)
def test_bad_guards_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Guards(**options)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    flow, other = fastmaf.MAF(3, 2, 8), fastmaf.MAF(3, 2, 8)
    with pytest.raises(ValueError, match="holds no parameter of the flow"):
        TrainingStep(flow, torch.optim.SGD(other.parameters()))


def test_an_empty_batch_is_named() -> None:
    flow = fastmaf.MAF(3, 2, 8)
    with pytest.raises(fastmaf.NonFiniteLossError, match="the batch has no rows"):
        TrainingStep(flow, torch.optim.SGD(flow.parameters()))(torch.zeros(0, 3))
