"""The check before any timing refuses every kind of wrong result by name; test_libraries.py has what it accepts."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmaf.bench.check import FEWEST_NUMBERS, LARGEST, MOST_PASSES, PASSES, WrongResultError, check
from fastmaf.bench.libraries import Library, Size
from fastmaf.bench.libraries.base import LEARNING_RATE
from tests.bench.helpers import build, uniform

SIZE = Size(47, (24, 24), 2)


@pytest.fixture
def seed() -> int:
    """Returns a fresh seed, which pytest shows where a test fails."""
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return seed


def refuse(library: Library, seed: int, part: str) -> None:
    """Asserts that the check names what is off, by how much, and what is allowed."""
    with pytest.raises(WrongResultError) as refused:
        check(library, seed)
    message = re.fullmatch(r"(.+) is off by (\S+), more than (\S+)", str(refused.value))
    assert message is not None, str(refused.value)
    assert message[1] == part and float(message[3]) == LARGEST[part]
    assert not float(message[2]) <= float(message[3])


def change(library: Library, method: str, wrong: Callable[[Tensor], Tensor]) -> Library:
    """Changes what a method returns."""
    correct = getattr(library, method)
    setattr(library, method, lambda *arguments: wrong(correct(*arguments)))
    return library


def nan_in_last_row(values: Tensor) -> Tensor:
    values = values.clone()
    values[-1] = torch.nan
    return values


WRONG_DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "a thousandth more": lambda y: y * 1.001,
    "shifted": lambda y: y + 0.01,
    "one NaN": nan_in_last_row,
    "infinite": lambda y: torch.full_like(y, torch.inf),
    "other images": lambda y: y.roll(1),
    "per dimension": lambda y: y / SIZE.features,
}
WRONG_INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "a thousandth more": lambda x: x * 1.001,
    "shifted": lambda x: x + 0.01,
    "one row NaN": nan_in_last_row,
    "other samples": lambda x: x.roll(1, 0),
    "another order": lambda x: x.flip(1),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("wrong", WRONG_DENSITIES)
@pytest.mark.parametrize("name", ["fastmaf", "naive"])
def test_a_wrong_density_is_refused(name: str, wrong: str, seed: int) -> None:
    refuse(change(build(name, SIZE, seed), "log_prob", WRONG_DENSITIES[wrong]), seed, "log_prob")


@pytest.mark.parametrize("wrong", WRONG_INVERSES)
@pytest.mark.parametrize("name", ["fastmaf", "naive", "zuko"])
def test_a_wrong_inverse_is_refused(name: str, wrong: str, seed: int) -> None:
    refuse(change(build(name, SIZE, seed), "inverse", WRONG_INVERSES[wrong]), seed, "inverse")


@pytest.mark.parametrize("name", ["naive", "dense"])
def test_fewer_passes_than_requested_are_refused(name: str, seed: int) -> None:
    library: Any = build(name, SIZE, seed)
    inverse = library.inverse
    library.inverse = lambda z, passes: inverse(z, passes - 1)
    refuse(library, seed, "inverse")


def test_passes_are_compared_in_every_dimension_that_they_finish(seed: int) -> None:
    def off(dimension: int) -> Library:
        shift = 0.01 * torch.nn.functional.one_hot(torch.tensor(dimension), PASSES + 5)
        return change(build("naive", Size(PASSES + 5, (24, 24), 2), seed), "inverse", lambda x: x + shift)

    refuse(off(0), seed, "inverse")
    refuse(off(PASSES - 1), seed, "inverse")
    check(off(PASSES), seed)


def optimizer_of(library: Any) -> torch.optim.Optimizer:
    return library.optimizer if hasattr(library, "optimizer") else library.step.optimizer


def scale_rate(factor: float) -> Callable[[Any], None]:
    def wrong(library: Any) -> None:
        new_optimizer = library.new_optimizer

        def other_rate() -> None:
            new_optimizer()
            for group in optimizer_of(library).param_groups:
                group["lr"] = factor * LEARNING_RATE

        library.new_optimizer = other_rate

    return wrong


def replace_step(step: Callable[[Callable[[Tensor], None], Tensor], object]) -> Callable[[Any], None]:
    def wrong(library: Any) -> None:
        correct = library.train_step
        library.train_step = lambda x: step(correct, x)

    return wrong


def keep_moments(library: Any) -> None:
    """Continues an earlier training, such as that of the memory measurement."""
    library.new_optimizer()
    for i in range(4):
        library.train_step(uniform(8, SIZE.features, i))
    library.new_optimizer = lambda: None


WRONG_STEPS: dict[str, Callable[[Any], None]] = {
    "no step": replace_step(lambda step, x: None),
    "five percent too far": scale_rate(1.05),
    "upwards": scale_rate(-1.0),
    "another batch": replace_step(lambda step, x: step(uniform(8, SIZE.features, 12345))),
    "half the batch": replace_step(lambda step, x: step(x[:4])),
    "two steps": replace_step(lambda step, x: (step(x), step(x))),
    "old moments": keep_moments,
}


@pytest.mark.parametrize("wrong", WRONG_STEPS)
@pytest.mark.parametrize("name", ["fastmaf", "naive"])
def test_a_wrong_training_step_is_refused(name: str, wrong: str, seed: int) -> None:
    library = build(name, SIZE, seed)
    WRONG_STEPS[wrong](library)
    refuse(library, seed, "train step")


@pytest.mark.parametrize(("optimizer", "options"), [("SGD", {}), ("AdamW", {"weight_decay": 100.0}), ("RMSprop", {})])
def test_another_optimizer_is_refused(optimizer: str, options: dict[str, float], seed: int) -> None:
    library: Any = build("naive", SIZE, seed)

    def new_optimizer() -> None:
        library.optimizer = getattr(torch.optim, optimizer)(library.model.parameters(), lr=LEARNING_RATE, **options)

    library.new_optimizer = new_optimizer
    refuse(library, seed, "train step")


def test_training_only_some_weights_is_refused(seed: int) -> None:
    library: Any = build("naive", SIZE, seed)
    library.model.blocks[0].requires_grad_(False)
    refuse(library, seed, "train step")


@pytest.mark.parametrize("wrong_batch", [1, 64])
def test_every_batch_that_will_be_timed_is_compared(wrong_batch: int, seed: int) -> None:
    batches = {"log_prob": [1, 8, 64], "sample": [1, 5], "train step": [8, 64]}
    library = build("naive", SIZE, seed)
    check(library, seed, batches)
    change(library, "log_prob", lambda y: y * 1.001 if len(y) == wrong_batch else y)
    with pytest.raises(WrongResultError, match="log_prob is off by"):
        check(library, seed, batches)


@pytest.mark.parametrize(
    "wrong",
    [lambda x: 2 * x, lambda x: x + 1, lambda x: x * torch.nan, lambda x: x[:-1]],
    ids=["wide", "off", "nan", "few"],
)
@pytest.mark.parametrize("name", ["fastmaf", "naive", "zuko"])
def test_samples_of_another_distribution_are_refused(name: str, wrong: Callable[[Tensor], Tensor], seed: int) -> None:
    with pytest.raises(WrongResultError, match="samples, of shape"):
        check(change(build(name, SIZE, seed), "sample", wrong), seed, {"sample": [64]})


def test_samples_that_take_too_many_passes_are_not_drawn(seed: int) -> None:
    library: Any = build("naive", Size(MOST_PASSES // 2 + 1, (2,), 2), seed)
    library.sample = lambda n: pytest.fail("samples were drawn")
    check(library, seed, {"sample": [1]})


@pytest.mark.parametrize("features", [1, 2, 6])
def test_samples_of_few_numbers_are_drawn_until_they_suffice(features: int, seed: int) -> None:
    library, drawn = build("fastmaf", Size(features, (8,), 1), seed), []
    sample = library.sample
    library.sample = lambda n: drawn.append(n) or sample(n)  # type: ignore[func-returns-value, method-assign]
    check(library, seed, {"sample": [1]})
    assert set(drawn) == {1} and len(drawn) * features >= FEWEST_NUMBERS > (len(drawn) - 1) * features
    change(library, "sample", lambda x: 1.5 * x)
    with pytest.raises(WrongResultError, match="samples, of shape"):
        check(library, seed, {"sample": [1]})
