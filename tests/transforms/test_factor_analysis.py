"""Fitting factors and noise to many and to few samples; wrong arguments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal

import fastmaf
from fastmaf.transforms import augmented_rows
from fastmaf.transforms.factor_analysis import Augment, FactorModel, fit_factors
from tests.core.contract import DTYPES
from tests.core.factors import World, covariance, density, mean_square, nll
from tests.core.helpers import normal
from tests.tolerances import F32, F64, error

pytestmark = pytest.mark.usefixtures("one_thread")


def test_many_samples_give_the_distribution_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmented_rows, "_MAX_ROWS", 500)  # the Gram matrix of 4,096 rows takes seconds
    world = World(30, 3)
    actual, x = fit_factors(world.draw(20_000), 3), world.draw(20_000, seed=1)
    entropy = 0.5 * (torch.logdet(world.covariance).item() / 30 + math.log(2 * math.pi) + 1)
    true = -float(MultivariateNormal(world.mean, world.covariance).log_prob(x).mean()) / 30
    assert abs(true - entropy) < 0.01, "the entropy is not that of the world"
    assert -1e-3 < nll(actual, x) - true < 0.02
    assert error(actual.mean, world.mean) < 0.1
    deviations = world.covariance.diagonal().sqrt()
    difference = (covariance(actual) - world.covariance) / (deviations[:, None] * deviations)
    assert float(difference.abs().max()) < 0.1


def test_factors_are_orthonormal_and_sorted_by_what_they_explain() -> None:
    actual = fit_factors(World(50, 4).draw(300), 4)
    assert error(actual.factors.T @ actual.factors, torch.eye(4, dtype=F64)) < 1e-12
    assert actual.scale.shape == actual.mean.shape == (50,) and (actual.scale > 0).all()
    assert torch.equal(actual.variance, actual.variance.sort(descending=True).values)


def in_sample(x: Tensor, rank: int) -> FactorModel:
    """Fits without cross-validation: variances and noise are those of the fitted samples."""

    def leading(rows: Tensor) -> Tensor:
        return torch.linalg.svd(rows, full_matrices=False).Vh[:rank].T

    mean = x.mean(dim=0)
    y = (x - mean) / (x - mean).square().mean(dim=0).sqrt()
    factors = leading(y)
    scale = (x - mean).square().mean(dim=0).sqrt() * (y - y @ factors @ factors.T).square().mean(dim=0).sqrt()
    factors = leading((x - mean) / scale)
    along = (x - mean) / scale @ factors
    return FactorModel(mean, scale, factors, (along.square().mean(dim=0) - 1).clamp_min(0))


@pytest.mark.parametrize("seed", range(3))
def test_few_samples_of_many_dimensions(seed: int) -> None:
    """The NLL of new samples is that of the model; without cross-validation it is far higher."""
    world = World(400, 20, weakest=0.5, seed=seed)
    x, new = world.draw(40, seed=seed), world.draw(500, seed=seed + 50)
    actual, naive = fit_factors(x, 30), in_sample(x, 30)
    assert 0.8 < mean_square(actual, new) < 1.25
    assert mean_square(naive, x) < 1.25 < 4 < mean_square(naive, new)
    assert nll(actual, new) < nll(naive, new) - 1


@pytest.mark.parametrize("n", [4, 5, 8, 12])
@pytest.mark.parametrize("rank", [1, 5, 30])
def test_very_few_samples(n: int, rank: int) -> None:
    """Four samples determine no covariance, but the noise must not be underestimated."""
    world = World(400, 20, weakest=0.5)
    actual = fit_factors(world.draw(n), rank)
    assert mean_square(actual, world.draw(200, seed=9)) < 8


@pytest.mark.parametrize("features, rank", [(9, 3), (30, 3), (30, 10), (100, 3)])
def test_noise_is_not_taken_for_less_than_it_is(features: int, rank: int) -> None:
    """However many of the dimensions the factors are: samples far more numerous than dimensions become white."""
    world = World(features, rank)
    actual = fit_factors(world.draw(400), rank)
    assert abs(mean_square(actual, world.draw(2000, seed=1)) - 1) < 0.1


def test_a_rank_beyond_what_samples_support() -> None:
    world, new = World(60, 2), World(60, 2).draw(50, seed=3)
    for n, rank in ((8, 60), (2, 5), (30, 60)):
        x = world.draw(n)
        actual = fit_factors(x, rank)
        assert actual.factors.shape[1] == len(actual.variance) <= n - 1, "more factors than centred samples have"
        whitening = fastmaf.GaussianWhitening(60, rank, dtype=F64).fit_(x)
        rank_found = actual.factors.shape[1]
        assert torch.equal(whitening.factors[:, rank_found:], torch.zeros(60, rank - rank_found))
        assert torch.equal(whitening.variance[rank_found:], torch.zeros(rank - rank_found))
        assert torch.isfinite(fastmaf.Flow(60, [whitening]).log_prob(new)).all()


def test_rank_zero_is_noise_alone() -> None:
    world = World(20, 3)
    x = world.draw(4000)
    actual = fit_factors(x, 0)
    assert actual.factors.shape == (20, 0) and actual.variance.shape == (0,)
    assert error(actual.scale.square(), x.var(dim=0, correction=0)) < 1e-2


def test_white_data_has_no_factors_to_speak_of() -> None:
    actual = fit_factors(normal(300, 100), 3)
    assert float(actual.variance.max()) < 0.5  # of the variance along 3 directions, chosen from 300 samples, 1 is noise
    assert float((covariance(actual) - torch.eye(100)).abs().max()) < 0.4


@DTYPES
def test_constant_dimensions(dtype: torch.dtype) -> None:
    """Constant dimensions, such as black borders of images, get the floor as noise."""
    x = World(20, 2).draw(30, dtype=dtype)
    x[:, 3], x[:, 7] = 0, 0.1
    actual = fit_factors(x, 4)
    assert all(bool(torch.isfinite(t).all()) for t in actual)
    floor = 1e-6 * float((x - x.mean(dim=0)).double().square().mean())
    assert error(actual.scale[[3, 7]].double().square(), torch.full((2,), floor, dtype=F64)) < 1e-3
    assert error(actual.mean[[3, 7]], torch.tensor([0, 0.1])) < 1e-6
    new = World(20, 2).draw(5, seed=1, dtype=dtype)
    new[:, 3], new[:, 7] = 0, 0.1
    assert torch.isfinite(density(actual).log_prob(new)).all()
    assert float(density(actual)(new)[0][:, [3, 7]].abs().max()) < 1


@DTYPES
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_nothing_but_constants(dtype: torch.dtype, value: float) -> None:
    x = torch.full((5, 6), value, dtype=dtype)
    actual = fit_factors(x, 3)
    assert all(bool(torch.isfinite(t).all()) for t in actual) and (actual.scale > 0).all()
    assert torch.isfinite(density(actual).log_prob(x)).all()


def test_a_floor_holds_the_noise_up() -> None:
    x = World(20, 2).draw(50)
    free, held = fit_factors(x, 2), fit_factors(x, 2, floor=1.5)
    assert float(free.scale.square().min()) < 1.5
    assert float(held.scale.square().min()) == pytest.approx(1.5)
    x[:, 3] = 1
    least = 1e-6 * float((x - x.mean(dim=0)).square().mean())
    assert float(fit_factors(x, 2).scale.square().min()) == pytest.approx(least)


@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_the_unit_of_x_does_not_matter(factor: float) -> None:
    x = World(40, 3).draw(60)
    one, other = fit_factors(x, 3), fit_factors(factor * x + 5 * factor, 3)
    assert error(covariance(other), factor**2 * covariance(one)) < 1e-8
    assert error(other.mean, factor * (one.mean + 5)) < 1e-12


@pytest.mark.parametrize("n, features, rank", [(40, 400, 10), (300, 30, 3)])
def test_float32_and_float64_agree(n: int, features: int, rank: int) -> None:
    x = World(features, rank).draw(n, dtype=F32)
    single, double = fit_factors(x, rank), fit_factors(x.double(), rank)
    assert all(t.dtype == F32 for t in single) and all(t.dtype == F64 for t in double)
    assert error(covariance(single), covariance(double)) < 1e-5
    assert error(single.mean, double.mean) < 1e-6


@pytest.mark.parametrize("deviation", [30.0, 1e3])
def test_float32_on_a_dominant_factor(deviation: float) -> None:
    """A dominant factor, such as brightness, of a million times the variance of the noise hides no weaker one."""
    directions = torch.linalg.qr(normal(24, 3)).Q
    strengths = torch.tensor([deviation, 10.0, 3.0], dtype=F64)
    x, new = (
        ((normal(n, 3, seed=seed) * strengths) @ directions.T + normal(n, 24, seed=seed + 1)).to(F32)
        for n, seed in ((60, 3), (200, 5))
    )
    single, double = fit_factors(x, 3), fit_factors(x.double(), 3)
    orthonormal = single.factors.double().T @ single.factors.double()
    assert float((orthonormal - torch.eye(3)).abs().max()) < 1e-6
    assert abs(nll(single, new) - nll(double, new.double())) < 1e-3


def test_it_writes_to_no_input_and_records_nothing() -> None:
    x = World(20, 2).draw(30).requires_grad_()
    before = x.detach().clone()
    whitening = fastmaf.GaussianWhitening(20, 2, dtype=F64).fit_(x)
    assert torch.equal(x, before)
    assert not any(t.requires_grad for t in whitening.buffers())
    strided = torch.stack((before, before), dim=2)[..., 0]
    assert error(covariance(fit_factors(strided, 2)), covariance(fit_factors(before, 2))) < 1e-10


def test_fit_takes_any_floating_dtype_to_its_own() -> None:
    x, whitening = World(20, 2).draw(30), fastmaf.GaussianWhitening(20, 2, dtype=F32)
    assert whitening.fit_(x) is whitening
    assert {t.dtype for t in whitening.buffers()} == {F32}
    expected = fit_factors(x, 2)
    assert error(whitening.factors @ whitening.factors.T, expected.factors @ expected.factors.T) < 1e-5


def test_the_seed_decides_and_nothing_else() -> None:
    x = World(40, 3).draw(23)
    state = torch.get_rng_state()
    one, again, other = (fit_factors(x, 3, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator was drawn from"
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("folds", [2, 3, 23, 1000])
def test_folds(folds: int) -> None:
    """More folds than samples leave out one at a time."""
    world = World(40, 3)
    actual = fit_factors(world.draw(23), 3, folds=folds)
    assert 0.5 < mean_square(actual, world.draw(500, seed=1)) < 2
    if folds > 23:
        alone = fit_factors(world.draw(23), 3, folds=23)
        assert all(torch.equal(a, b) for a, b in zip(actual, alone, strict=True))


def augmented(basis: Callable[[Tensor], Any], weights: Any) -> dict[str, Augment]:
    return {"augment": lambda x: (basis(x), weights)}


ONE = torch.ones(1, 1, dtype=F64)
WRONG: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any], str]] = {
    "one sample": (lambda x: x[:1], {}, r"\[n, D\] with n >= 2; found torch.float64 \[1, 6\]"),
    "no samples": (lambda x: x[:0], {}, r"n >= 2; found torch.float64 \[0, 6\]"),
    "one dimension": (lambda x: x[0], {}, r"\[n, D\].*found torch.float64 \[6\]"),
    "three dimensions": (lambda x: x[None], {}, r"\[n, D\].*found torch.float64 \[1, 9, 6\]"),
    "integers": (lambda x: x.long(), {}, r"floating point.*found torch.int64 \[9, 6\]"),
    "NaN": (lambda x: x.index_fill(1, torch.tensor(2), math.nan), {}, "x .*not finite"),
    "infinity": (lambda x: x.index_fill(1, torch.tensor(2), math.inf), {}, "x .*not finite"),
    "negative rank": (lambda x: x, {"rank": -1}, "rank must be at least 0.*found -1"),
    "one fold": (lambda x: x, {"folds": 1}, "folds at least 2.*found.*1"),
    "no floor": (lambda x: x, {"floor": 0.0}, "floor must be positive.*found 0"),
    "negative floor": (lambda x: x, {"floor": -2.0}, "floor must be positive.*found -2"),
    "NaN floor": (lambda x: x, {"floor": math.nan}, "floor must be positive.*found nan"),
    "infinite floor": (lambda x: x, {"floor": math.inf}, "floor.*found inf"),
    "flat basis": (lambda x: x, augmented(lambda x: x, ONE), r"basis \[4, p, 6\]; found \[4, 6\]"),
    "basis of fewer": (lambda x: x, augmented(lambda x: x[1:, None], ONE), r"basis \[4, p, 6\]; found \[3, 1, 6\]"),
    "basis of other dimensions": (
        lambda x: x, augmented(lambda x: x[:, None, 1:], ONE), r"basis \[4, p, 6\]; found \[4, 1, 5\]"
    ),
    "flat weights": (lambda x: x, augmented(lambda x: x[:, None], ONE[0]), r"weights \[copies, 1\]; found \[1\]"),
    "more weights": (
        lambda x: x, augmented(lambda x: x[:, None], torch.full((4, 2), 0.5)), r"weights \[copies, 1\]; found \[4, 2\]"
    ),
    "no copies": (lambda x: x, augmented(lambda x: x[:, None], ONE[:0]), r"weights.*found \[0, 1\]"),
    "weights of two": (lambda x: x, augmented(lambda x: x[:, None], 2 * ONE), "weights must sum to 1.*found.*2"),
    "NaN weights": (lambda x: x, augmented(lambda x: x[:, None], math.nan * ONE), "weights must sum to 1.*found.*nan"),
    "NaN basis": (lambda x: x, augmented(lambda x: x[:, None] * math.nan, ONE), "augment.*not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str) -> None:
    change, options, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        fit_factors(change(normal(9, 6)), **{"rank": 2, **options})


def test_a_failed_fit_leaves_the_whitening_as_it_was() -> None:
    whitening = fastmaf.GaussianWhitening(6, 2, dtype=F64).fit_(normal(30, 6))
    before, x = {k: t.clone() for k, t in whitening.state_dict().items()}, normal(3, 6)
    z, ladj = whitening(x)
    for wrong, words in (
        (normal(9, 5), r"\[n, 6\]; found \[9, 5\]"),
        (normal(6), r"\[n, 6\]; found \[6\]"),
        (normal(1, 6), "n >= 2"),
        (math.nan * normal(9, 6), "not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            whitening.fit_(wrong)
    assert all(torch.equal(t, before[k]) for k, t in whitening.state_dict().items())
    assert torch.equal(whitening(x)[0], z) and torch.equal(whitening(x)[1], ladj)


@given(
    n=st.integers(2, 12), features=st.integers(1, 9), rank=st.integers(0, 9), folds=st.integers(2, 6),
    seed=st.integers(0, 1000), dtype=st.sampled_from([F32, F64]),
)  # fmt: skip
@settings(max_examples=60)
def test_any_shape_gives_a_density(n: int, features: int, rank: int, folds: int, seed: int, dtype: torch.dtype) -> None:
    x = normal(n, features, seed=seed, dtype=dtype)
    actual = fit_factors(x, rank, folds=folds)
    assert all(t.dtype == dtype and bool(torch.isfinite(t).all()) for t in actual)
    assert (actual.scale > 0).all() and (actual.variance >= 0).all()
    assert actual.factors.shape[1] == len(actual.variance) <= min(rank, features)
    assert torch.isfinite(density(actual).log_prob(x)).all()


def test_ranks_and_samples_around_the_number_of_dimensions() -> None:
    """n = D, D + 1, D - 1 and rank D: no more factors than there are directions."""
    for n, rank in itertools.product((19, 20, 21, 60), (19, 20)):
        actual = fit_factors(World(20, 3).draw(n), rank)
        assert error(actual.factors.T @ actual.factors, torch.eye(actual.factors.shape[1], dtype=F64)) < 1e-10
        assert torch.isfinite(density(actual).log_prob(World(20, 3).draw(5, seed=1))).all()
