"""The check before any time: it lets right sides through and refuses every way of being wrong, saying what is off."""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmaf.bench import check as checking
from fastmaf.bench.check import LARGEST, WrongResultError, check
from fastmaf.bench.sides import SIDES, Side, Size, side_class
from fastmaf.bench.sides.side import LEARNING_RATE
from tests.bench.plans import one_thread, uniform

SIZE = Size(47, (24, 24), 2)
SIDES_CHECKED = ("fastmaf", "fastmaf (reference)", "naive", "dense", "nflows", "zuko", "normflows")
INVERTING_BY_PASSES = ("naive", "dense", "nflows", "zuko", "normflows")


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def seed() -> int:
    """Returns a fresh seed, which pytest shows where a test fails."""
    drawn = secrets.randbelow(2**31)
    print(f"seed {drawn}")
    return drawn


def build(name: str, seed: int, size: Size = SIZE) -> Side:
    if SIDES[name].package is not None:
        pytest.importorskip(SIDES[name].package or "")
    return side_class(name)(size, seed)


def refuse(side: Side, seed: int, what: str) -> None:
    """The check must refuse the side and name what is off, by how much, and what would be borne."""
    with pytest.raises(WrongResultError) as refused:
        check(side, seed)
    told = re.fullmatch(r"(.+) is off by (\S+), more than (\S+)", str(refused.value))
    assert told is not None, str(refused.value)
    assert told[1] == what
    assert float(told[3]) == LARGEST[what]
    assert not float(told[2]) <= float(told[3])


def change(side: Side, method: str, wrong: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Side:
    """Puts in the place of a method what ``wrong`` makes of it."""
    setattr(side, method, wrong(getattr(side, method)))
    return side


def result(make: Callable[[Tensor], Tensor]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Changes what a method returns."""
    return lambda right: lambda *arguments: make(right(*arguments))


@pytest.mark.parametrize("size", [SIZE, Size(12, (31, 31), 2), Size(20, (9,), 1)], ids=str)
@pytest.mark.parametrize("name", SIDES_CHECKED)
def test_a_right_side_passes(name: str, size: Size, seed: int) -> None:
    errors = check(build(name, seed, size), seed)
    assert list(errors) == ["log_prob", "inverse", "train step"]
    # Far from what is refused: another machine's sums may err more than this one's.
    assert all(0 <= error < LARGEST[what] / 5 for what, error in errors.items()), errors


def test_a_side_that_cannot_train_passes_without_a_step(seed: int) -> None:
    errors = check(build("fastmaf, bfloat16", seed), seed)
    assert list(errors) == ["log_prob", "inverse"]


def nan_in_one(values: Tensor) -> Tensor:
    values = values.clone()
    values[-1] = torch.nan
    return values


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda found: found * 1.001, id="a thousandth more"),
        pytest.param(lambda found: found * (1 - 1e-3), id="a thousandth less"),
        pytest.param(lambda found: found + 0.01, id="shifted"),
        pytest.param(lambda found: found * torch.nan, id="NaN"),
        pytest.param(nan_in_one, id="one NaN"),
        pytest.param(lambda found: torch.full_like(found, torch.inf), id="infinite"),
        pytest.param(lambda found: found.roll(1), id="other images"),
        pytest.param(lambda found: found.mean().expand_as(found), id="the mean"),
        pytest.param(lambda found: -found, id="the loss"),
        pytest.param(lambda found: found / SIZE.features, id="per dimension"),
    ],
)
@pytest.mark.parametrize("name", ["fastmaf", "naive", "nflows"])
def test_a_side_with_a_wrong_log_prob_is_refused(name: str, wrong: Callable[[Tensor], Tensor], seed: int) -> None:
    refuse(change(build(name, seed), "log_prob", result(wrong)), seed, "log_prob")


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda x: x + 0.01, id="shifted"),
        pytest.param(lambda x: x * 1.001, id="a thousandth more"),
        pytest.param(lambda x: x * torch.nan, id="NaN"),
        pytest.param(nan_in_one, id="one row NaN"),
        pytest.param(lambda x: x.roll(1, 0), id="other samples"),
        pytest.param(lambda x: x.flip(1), id="another order"),
        pytest.param(torch.zeros_like, id="nothing"),
    ],
)
@pytest.mark.parametrize("name", ["fastmaf", "naive", "nflows", "zuko"])
def test_a_side_with_a_wrong_inverse_is_refused(name: str, wrong: Callable[[Tensor], Tensor], seed: int) -> None:
    method = "passes" if name in INVERTING_BY_PASSES else "inverse"
    refuse(change(build(name, seed), method, result(wrong)), seed, "inverse")


@pytest.mark.parametrize("name", ["fastmaf", "naive", "nflows"])
def test_a_side_that_hands_back_its_base_points_is_refused(name: str, seed: int) -> None:
    side = build(name, seed)
    method = "passes" if name in INVERTING_BY_PASSES else "inverse"
    refuse(change(side, method, lambda _: lambda z, *_: z), seed, "inverse")


def test_passes_of_another_block_are_refused(seed: int) -> None:
    side: Any = build("naive", seed)
    other = copy.deepcopy(side)
    other.model.blocks = torch.nn.ModuleList(reversed(other.model.blocks))
    refuse(change(side, "passes", lambda _: other.passes), seed, "inverse")


def test_an_inverse_of_the_blocks_in_another_order_is_refused(seed: int) -> None:
    side: Any = build("fastmaf", seed)
    other = copy.deepcopy(side)
    other.flow.transforms = torch.nn.ModuleList(reversed(other.flow.transforms))
    refuse(change(side, "inverse", lambda _: other.inverse), seed, "inverse")


@pytest.mark.parametrize("name", ["naive", "dense"])
def test_fewer_passes_than_asked_for_are_refused(name: str, seed: int) -> None:
    side = build(name, seed)
    refuse(change(side, "passes", lambda right: lambda z, count: right(z, count - 1)), seed, "inverse")


def test_passes_are_held_against_the_twin_in_every_finished_dimension(seed: int) -> None:
    """A single dimension among those that are final is enough; those that are not are not looked at."""
    wide = Size(checking.PASSES + 5, SIZE.hidden, SIZE.blocks)

    def off(place: int) -> Callable[[Tensor], Tensor]:
        def shift(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, place] += 0.01
            return x

        return shift

    for place in (0, checking.PASSES - 1):
        refuse(change(build("naive", seed, wide), "passes", result(off(place))), seed, "inverse")
    check(change(build("naive", seed, wide), "passes", result(off(checking.PASSES))), seed)


def with_rate(rate: float) -> Callable[[Side], None]:
    def wrong(side: Any) -> None:
        right = side.new_optimizer

        def new_optimizer() -> None:
            right()
            optimizer = side.optimizer if hasattr(side, "optimizer") else side.step.optimizer
            for group in optimizer.param_groups:
                group["lr"] = rate

        side.new_optimizer = new_optimizer

    return wrong


def does_nothing(side: Any) -> None:
    side.train_step = lambda x: None


def takes_another_batch(side: Any) -> None:
    right, other = side.train_step, uniform(8, SIZE.features, 12345)
    side.train_step = lambda x: right(other)


def takes_half_the_batch(side: Any) -> None:
    right = side.train_step
    side.train_step = lambda x: right(x[:4])


def takes_two_steps(side: Any) -> None:
    right = side.train_step

    def twice(x: Tensor) -> None:
        right(x)
        right(x)

    side.train_step = twice


def keeps_its_moments(side: Any) -> None:
    """Has trained before, as in the measuring of its memory, and goes on from there."""
    side.new_optimizer()
    for i in range(4):
        side.train_step(uniform(8, SIZE.features, i))
    side.new_optimizer = lambda: None


def gives_nan(side: Any) -> None:
    right = side.train_step

    def broken(x: Tensor) -> None:
        right(x)
        log_prob = side.log_prob
        side.log_prob = lambda x: log_prob(x) * torch.nan

    side.train_step = broken


WRONG_STEPS = {
    "no step": does_nothing,
    "a rate ten times as large": with_rate(10 * LEARNING_RATE),
    "a rate twice as large": with_rate(2 * LEARNING_RATE),
    "a rate five percent larger": with_rate(1.05 * LEARNING_RATE),
    "a rate five percent smaller": with_rate(0.95 * LEARNING_RATE),
    "upwards": with_rate(-LEARNING_RATE),
    "another batch": takes_another_batch,
    "half the batch": takes_half_the_batch,
    "two steps": takes_two_steps,
    "old moments": keeps_its_moments,
    "NaN": gives_nan,
}


@pytest.mark.parametrize("wrong", WRONG_STEPS.values(), ids=WRONG_STEPS)
@pytest.mark.parametrize("name", ["fastmaf", "naive", "nflows"])
def test_a_side_with_a_wrong_train_step_is_refused(name: str, wrong: Callable[[Side], None], seed: int) -> None:
    side = build(name, seed)
    wrong(side)
    refuse(side, seed, "train step")


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "RMSprop", "Adagrad"])
def test_a_side_with_another_optimizer_is_refused(optimizer: str, seed: int) -> None:
    side: Any = build("naive", seed)
    options = {"AdamW": {"weight_decay": 100.0}}.get(optimizer, {})

    def new_optimizer() -> None:
        side.optimizer = getattr(torch.optim, optimizer)(side.model.parameters(), lr=LEARNING_RATE, **options)

    side.new_optimizer = new_optimizer
    refuse(side, seed, "train step")


def test_a_side_that_trains_a_part_of_its_weights_is_refused(seed: int) -> None:
    side: Any = build("naive", seed)
    for parameter in side.model.blocks[0].parameters():
        parameter.requires_grad_(False)
    refuse(side, seed, "train step")


def test_no_relative_error_of_a_thousandth_is_borne() -> None:
    """Neither of densities nor of samples. Adam's first step has its own, larger measure, which its table explains."""
    assert LARGEST["log_prob"] <= 1e-4 and LARGEST["inverse"] <= 5e-4
    assert LARGEST["train step"] <= 2e-2


def test_every_error_is_told_before_any_is_judged(seed: int) -> None:
    """The order of what is named: a wrong density is the reason of whatever else is wrong."""
    side = change(build("naive", seed), "log_prob", result(lambda found: found * 2))
    does_nothing(side)
    refuse(side, seed, "log_prob")


def test_other_inputs_are_drawn_for_another_seed() -> None:
    seen: list[Tensor] = []

    def noting(right: Callable[..., Any]) -> Callable[..., Any]:
        def log_prob(x: Tensor) -> Any:
            seen.append(x.clone())
            return right(x)

        return log_prob

    for seed in (1, 1, 2):
        check(change(build("naive", 0), "log_prob", noting), seed)
    calls = len(seen) // 3
    one, same, other = seen[::calls]
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (8, SIZE.features)


@pytest.mark.parametrize("name", ["fastmaf", "naive", "nflows", "zuko", "normflows"])
def test_every_batch_that_will_be_timed_is_compared(name: str, seed: int) -> None:
    """A side that is right for eight images and wrong for one, or for 64, is refused."""
    batches = {"log_prob": [1, 8, 64], "sample": [1, 5], "train step": [8, 64]}
    check(build(name, seed), seed, batches)
    for wrong in (1, 64):

        def off(right: Callable[..., Any], wrong: int = wrong) -> Callable[..., Any]:
            return lambda x: right(x) * 1.001 if len(x) == wrong else right(x)

        with pytest.raises(WrongResultError, match="log_prob is off by"):
            check(change(build(name, seed), "log_prob", off), seed, batches)


def test_samples_that_would_take_too_many_passes_are_not_drawn(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes themselves are compared; fastmaf, which takes none, draws its samples whatever the size."""
    monkeypatch.setattr(checking, "WHOLE", SIZE.features * SIZE.blocks - 1)
    drawn: list[str] = []
    for name in ("fastmaf", "naive"):

        def noting(right: Callable[..., Any], name: str = name) -> Callable[..., Any]:
            return lambda n: (drawn.append(name), right(n))[1]

        check(change(build(name, seed), "sample", noting), seed, {"sample": [1, 64]})
    assert drawn == ["fastmaf", "fastmaf"]


@pytest.mark.parametrize("name", ["fastmaf", "naive", "nflows", "zuko", "normflows"])
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda x: 2 * x, id="twice as far out"),
        pytest.param(lambda x: x + 1, id="shifted"),
        pytest.param(lambda x: x * torch.nan, id="NaN"),
        pytest.param(lambda x: x[:-1], id="one too few"),
    ],
)
def test_samples_that_are_not_the_model_s_are_refused(name: str, wrong: Callable[[Tensor], Tensor], seed: int) -> None:
    side = change(build(name, seed), "sample", result(wrong))
    with pytest.raises(WrongResultError, match="samples, of shape"):
        check(side, seed, {"sample": [64]})
