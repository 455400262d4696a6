"""GaussianWhitening: the density of a normal distribution, for covariances of any condition."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal

import fastmaf
from fastmaf.transforms.factor_analysis import FactorModel
from tests.core.contract import DTYPES, TransformContract, log_normal
from tests.core.helpers import blocks_of, build, generator, jacobian, normal, train
from tests.tolerances import F32, F64, TOLERANCES, assert_close, assert_float32, distance, error

pytestmark = pytest.mark.usefixtures("one_thread")


def model(features: int, rank: int, *, largest: float = 30.0, seed: int = 0) -> FactorModel:
    """Returns a random model whose factors have variances up to ``largest``."""
    draw = generator(seed)
    factors = torch.linalg.qr(torch.randn(features, max(rank, 1), generator=draw, dtype=F64)).Q[:, :rank]
    variance = largest ** torch.rand(rank, generator=draw, dtype=F64)
    variance[: min(rank, 1)] = largest
    scale = torch.exp(1.5 * torch.rand(features, generator=draw, dtype=F64) - 1)
    return FactorModel(3 * torch.randn(features, generator=draw, dtype=F64), scale, factors, variance)


def whitening(features: int, rank: int, dtype: torch.dtype = F64, **options: Any) -> fastmaf.GaussianWhitening:
    actual = fastmaf.GaussianWhitening(features, rank, dtype=dtype)
    actual.set_(model(features, rank, **options))
    return actual


def covariance(of: fastmaf.GaussianWhitening) -> Tensor:
    inner = torch.eye(of.features, dtype=F64) + of.factors.double() * of.variance.double() @ of.factors.double().T
    return of.scale.double()[:, None] * inner * of.scale.double()


def draw(of: fastmaf.GaussianWhitening, n: int, seed: int = 0) -> Tensor:
    """Draws ``n`` samples from the normal distribution, independently of the transform."""
    root = torch.linalg.cholesky(covariance(of))
    return (of.mean.double() + normal(n, of.features, seed=seed) @ root.T).to(of.mean.dtype)


class TestContract(TransformContract):
    features = 12

    def transform(self, dtype: torch.dtype = F64) -> fastmaf.GaussianWhitening:
        return whitening(12, 4, dtype)

    def fresh(self, dtype: torch.dtype = F64) -> fastmaf.GaussianWhitening:
        return whitening(12, 4, dtype, seed=1)


class TestContractOfRankZero(TransformContract):
    features = 7

    def transform(self, dtype: torch.dtype = F64) -> fastmaf.GaussianWhitening:
        return whitening(7, 0, dtype)

    def fresh(self, dtype: torch.dtype = F64) -> fastmaf.GaussianWhitening:
        return whitening(7, 0, dtype, seed=1)


@given(
    features=st.integers(1, 14),
    part=st.floats(0, 1),
    largest=st.sampled_from([0.1, 30.0, 1e4, 1e6]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60)
def test_it_is_the_normal_distribution(features: int, part: float, largest: float, seed: int) -> None:
    rank = round(part * features)
    of = whitening(features, rank, largest=largest, seed=seed)
    flow, x = fastmaf.Flow(features, [of]), 3 * normal(5, features, seed=seed)
    actual = flow.log_prob(x)
    assert_close("normal", actual, MultivariateNormal(of.mean, covariance(of)).log_prob(x), "dense")
    if rank:
        low = LowRankMultivariateNormal(of.mean, of.scale[:, None] * of.factors * of.variance.sqrt(), of.scale.square())
        assert_close("normal", actual, low.log_prob(x), "low rank")


def test_it_whitens_by_the_symmetric_root() -> None:
    """Of all whitenings the symmetric one is nearest to y, the data in units of the noise."""
    of = whitening(9, 4)
    slopes = jacobian(lambda v: of(v)[0], normal(9))
    assert_close("slogdet", slopes @ covariance(of) @ slopes.T, torch.eye(9, dtype=F64))
    in_units_of_noise = slopes * of.scale
    assert_close("slogdet", in_units_of_noise, in_units_of_noise.T)
    assert (torch.linalg.eigvalsh(in_units_of_noise) > 0).all()
    assert_close("values", of(of.mean[None])[0], torch.zeros(1, 9, dtype=F64))


def test_samples_are_of_the_distribution() -> None:
    of = whitening(5, 2)
    flow = fastmaf.Flow(5, [of])
    x, log_prob = flow.sample_and_log_prob(40_000, generator=generator())
    assert_close("sample_log_prob", log_prob, flow.log_prob(x))
    deviations = covariance(of).diagonal().sqrt()
    assert float(((x.mean(dim=0) - of.mean) / deviations).abs().max()) < 0.03
    assert float(((x.T.cov() - covariance(of)) / (deviations[:, None] * deviations)).abs().max()) < 0.03


@pytest.mark.parametrize("rank", [0, 3, 8])
@DTYPES
def test_unfitted_it_is_the_identity(rank: int, dtype: torch.dtype) -> None:
    of, x = fastmaf.GaussianWhitening(8, rank, dtype=dtype), normal(4, 8, dtype=dtype)
    for function in (of, of.inverse):
        assert torch.equal(function(x)[0], x) and torch.equal(function(x)[1], torch.zeros(4, dtype=dtype))
    assert torch.equal(fastmaf.Flow(8, [of]).nll_per_dim(x), -log_normal(x))


def test_terms_of_each_dimension() -> None:
    """½ log(1 + S²) of a factor belongs to dimensions as its square does; a dimension's noise to that dimension."""
    of, x = whitening(9, 4), normal(5, 9)
    shares = of.scale.log() + (of.factors.square() * (0.5 * (1 + of.variance).log())).sum(dim=1)
    assert_close("values", fastmaf.Flow(9, [of]).nll_per_dim(x), shares - log_normal(of(x)[0]))
    # Dimensions that are independent of all others have densities of their own.
    factors = torch.zeros(3, 1, dtype=F64)
    factors[1] = 1
    of = fastmaf.GaussianWhitening(3, 1, dtype=F64)
    of.set_(FactorModel(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 0.5, 1]), factors, torch.tensor([8.0])))
    x = normal(6, 3)
    independent = torch.distributions.Normal(of.mean, torch.tensor([2.0, 0.5 * 3, 1], dtype=F64))
    assert_close("values", fastmaf.Flow(3, [of]).nll_per_dim(x), -independent.log_prob(x))


def test_set_replaces_all_of_the_model_before() -> None:
    of, few = whitening(9, 4), model(9, 2, seed=5)
    of.set_(few)
    assert torch.equal(of.factors[:, 2:], torch.zeros(9, 2)) and torch.equal(of.variance[2:], torch.zeros(2))
    same = fastmaf.GaussianWhitening(9, 2, dtype=F64)
    same.set_(few)
    for actual, expected in zip(of(normal(3, 9)), same(normal(3, 9)), strict=True):
        assert_close("values", actual, expected)


NAMES = ("z", "ladj", "x", "ladj of x", "log_prob")


def by_hand(of: fastmaf.GaussianWhitening, x: np.ndarray, z: np.ndarray) -> dict[str, np.ndarray]:
    """The same with dense roots of the covariance, in numpy, every step in the dtype of x."""
    dtype = x.dtype.type
    mean, scale, factors, variance = (t.numpy().astype(dtype) for t in (of.mean, of.scale, of.factors, of.variance))
    one, half, identity = dtype(1), dtype(0.5), np.eye(of.features, dtype=dtype)
    deviation = np.sqrt(one + variance)
    root = identity + (factors * (deviation - one)) @ factors.T
    inverse_root = identity + (factors * (one / deviation - one)) @ factors.T
    there = ((x - mean) / scale) @ inverse_root
    ladj = -(np.log(scale).sum() + half * np.log(one + variance).sum()) * np.ones(len(x), dtype=dtype)
    log_prob = ladj - half * (there * there + dtype(math.log(2 * math.pi))).sum(axis=1)
    return dict(zip(NAMES, (there, ladj, z @ root * scale + mean, -ladj, log_prob), strict=True))


@pytest.mark.parametrize("features, rank", [(5, 2), (64, 64), (257, 31)])
@pytest.mark.parametrize("largest", [10.0, 1e6])
@pytest.mark.parametrize("fitted", [False, True], ids=["given", "fitted"])
def test_float32(features: int, rank: int, largest: float, fitted: bool) -> None:
    """No less exact than dense roots in float32, on data of the distribution itself; the truth is float64."""
    errors: dict[str, list[tuple[float, float]]] = {}
    peer: dict[str, list[tuple[float, float]]] = {}
    for seed in range(6):
        of = whitening(features, rank, F32, largest=largest, seed=seed)
        x, z = draw(of, 33, seed), normal(33, features, seed=seed + 100, dtype=F32)
        if fitted:
            of.fit_(draw(of, 40, seed=seed + 200), seed=seed)
        actual, truth = (
            dict(zip(NAMES, (*flow(a), *flow.inverse(b), flow.log_prob(a)), strict=True))
            for flow, a, b in (
                (fastmaf.Flow(features, [of]), x, z),
                (fastmaf.Flow(features, [copy.deepcopy(of).double()]), x.double(), z.double()),
            )
        )
        other = by_hand(of, x.numpy(), z.numpy())
        for name in NAMES:
            assert actual[name].dtype == torch.from_numpy(other[name]).dtype == F32
            errors.setdefault(name, []).append(distance(actual[name], truth[name]))
            peer.setdefault(name, []).append(distance(torch.from_numpy(other[name]), truth[name]))
    assert_float32(errors, peer)


def test_the_peer_computes_the_same() -> None:
    """The computation that float32 errors are compared with is the same function."""
    of = whitening(31, 7, largest=100.0)
    x, z = draw(of, 9), normal(9, 31, seed=1)
    flow = fastmaf.Flow(31, [of])
    other = by_hand(of, x.numpy(), z.numpy())
    for name, value in zip(NAMES, (*flow(x), *flow.inverse(z), flow.log_prob(x)), strict=True):
        assert_close("slogdet", torch.from_numpy(other[name]), value, name)


@pytest.mark.parametrize("largest", [10.0, 1e6])
@pytest.mark.parametrize("fitted", [False, True], ids=["given", "fitted"])
def test_a_float32_model_in_float64_is_invertible(largest: float, fitted: bool) -> None:
    """Its columns are orthonormal to float32's rounding only; its inverse is as exact as float64 all the same."""
    of = whitening(61, 9, F32, largest=largest)
    x, z = draw(of, 40).double(), normal(40, 61)
    if fitted:
        of.fit_(x.float())
    of.double()
    allowed = 10 * TOLERANCES["round_trip"][F64] * math.sqrt(1 + float(of.variance.max()))
    assert error(of.inverse(of(x)[0])[0], x) <= allowed
    assert error(of(of.inverse(z)[0])[0], z) <= allowed
    slopes = torch.linalg.slogdet(jacobian(lambda v: of(v)[0], x[0])).logabsdet
    assert error(of(x[:1])[1][0], slopes) <= allowed


@pytest.mark.parametrize("largest", [1.0, 1e2, 1e4, 1e6])
@DTYPES
def test_round_trip_of_an_ill_conditioned_model(largest: float, dtype: torch.dtype) -> None:
    """Errors grow with the largest factor's deviation, and with nothing else."""
    of = whitening(61, 9, dtype, largest=largest)
    x, z = draw(of, 65), normal(65, 61, dtype=dtype)
    allowed = TOLERANCES["round_trip"][dtype] * math.sqrt(1 + largest)
    assert error(of.inverse(of(x)[0])[0], x) <= allowed
    assert error(of(of.inverse(z)[0])[0], z) <= allowed


def test_in_a_maf() -> None:
    flow = fastmaf.MAF(13, 2, (17,), whitening=3, seed=0, dtype=F64)
    plain = fastmaf.MAF(13, 2, (17,), seed=0, dtype=F64)
    first, x = flow.transforms[0], normal(5, 13)
    assert isinstance(first, fastmaf.GaussianWhitening) and first.rank == 3
    assert not any(isinstance(t, fastmaf.GaussianWhitening) for t in plain.transforms)
    assert_close("values", flow.log_prob(x), plain.log_prob(x), "unfitted, or the seed gives other blocks")
    first.set_(model(13, 3))
    z, ladj = first(x)
    assert_close("values", flow.log_prob(x), plain.log_prob(z) + ladj)
    assert_close("values", flow.nll_per_dim(x), plain.nll_per_dim(z) + first.forward_per_dim(x, torch.zeros_like(x))[1])
    assert_close("round_trip", flow.inverse(flow(x)[0])[0], x)
    assert len(blocks_of(flow)) == 2 and {name for name, _ in flow.named_parameters()} == {
        f"transforms.{i}.{name}" for i, t in enumerate(flow.transforms) for name, _ in t.named_parameters()
    }
    before = {name: t.clone() for name, t in first.state_dict().items()}
    train(flow, normal(64, 13), steps=3)
    assert all(torch.equal(t, before[name]) for name, t in first.state_dict().items()), "training moved the whitening"


def test_rank_zero_in_a_maf() -> None:
    first = fastmaf.MAF(5, 1, (7,), whitening=0, seed=0).transforms[0]
    assert isinstance(first, fastmaf.GaussianWhitening) and first.rank == 0


def test_a_maf_on_meta_takes_no_memory() -> None:
    planned = fastmaf.MAF(12_288, 2, (64,), whitening=48, device="meta")
    assert all(t.is_meta for t in (*planned.parameters(), *planned.buffers()))
    without = fastmaf.memory_estimate(fastmaf.MAF(12_288, 2, (64,), device="meta"), 8, None)
    # The factors, mean and scale, at least.
    assert fastmaf.memory_estimate(planned, 8, None) >= without + 4 * 12_288 * (48 + 2)


def test_images_need_no_dense_covariance() -> None:
    """O(D · rank): a dense root at this size would be 604 MB."""
    of = whitening(12_288, 8, F32, largest=1e3)
    x = normal(2, 12_288, dtype=F32)
    z, ladj = of(x)
    assert_close("round_trip", of.inverse(z)[0], x)
    expected = -(of.scale.double().log().sum() + 0.5 * of.variance.double().log1p().sum())
    assert error(ladj, expected.expand(2)) <= 2 * torch.finfo(F32).eps


@pytest.mark.parametrize("features, rank, words", [
    (0, 0, "features must be at least 1; found 0"), (-3, 0, "features must be at least 1; found -3"),
    (4, -1, "rank must be 0 to features = 4; found -1"), (4, 5, "rank must be 0 to features = 4; found 5"),
])  # fmt: skip
def test_wrong_sizes_are_named(features: int, rank: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fastmaf.GaussianWhitening(features, rank)
    if features > 0:
        with pytest.raises(ValueError, match=words):
            fastmaf.MAF(features, 1, (5,), whitening=rank)


@pytest.mark.parametrize("name, value", [("scale", 0.0), ("scale", -1.0), ("scale", math.nan), ("variance", -1e-9),
                                         ("variance", math.nan)])  # fmt: skip
def test_a_damaged_state_dict_is_refused(name: str, value: float) -> None:
    state = copy.deepcopy(whitening(6, 2).state_dict())
    state[name][-1] = value
    with pytest.raises(ValueError, match=f"{name}.*found {value:g}"):
        whitening(6, 2).load_state_dict(state)
    with pytest.raises(ValueError, match=f"transforms.0.{name}"):
        fastmaf.Flow(6, [whitening(6, 2)]).load_state_dict({f"transforms.0.{k}": v for k, v in state.items()})


def test_a_state_dict_of_another_rank_is_refused() -> None:
    with pytest.raises(RuntimeError, match="factors"):
        whitening(6, 3).load_state_dict(whitening(6, 2).state_dict())


def test_a_state_dict_of_another_dtype() -> None:
    single, double, x = whitening(6, 2, F32, seed=3), whitening(6, 2), normal(3, 6)
    single.load_state_dict(double.state_dict())
    assert single.mean.dtype == F32
    assert_close("values", single(x.float())[0], double(x)[0])
    assert_close("values", single(x.float())[1], double(x)[1])


def test_wrong_inputs_are_named() -> None:
    flow = fastmaf.Flow(6, [whitening(6, 2)])
    with pytest.raises(ValueError, match=r"\[\.\.\., 6\]; found \[2, 5\]"):
        flow.log_prob(normal(2, 5))
    with pytest.raises(ValueError, match="float64.*found torch.float32"):
        flow.log_prob(normal(2, 6, dtype=F32))


def test_arrays_are_fitted_as_tensors_are() -> None:
    x = normal(50, 6)
    fitted = [fastmaf.GaussianWhitening(6, 2, dtype=x.dtype).fit_(data) for data in (x, x.numpy(), x.tolist())]
    for other in fitted[1:]:
        assert torch.equal(other(x)[0], fitted[0](x)[0])
    with pytest.raises(TypeError, match="x must be a tensor, a NumPy array or a nested list of numbers"):
        fitted[0].fit_("data")


def test_a_copy_is_of_the_fitted_model() -> None:
    """Refitting the original leaves the log-determinant of a copy unchanged."""
    flow = fastmaf.Flow(6, [whitening(6, 2)])
    twin, x = copy.deepcopy(flow), normal(3, 6)
    first = twin.transforms[0]
    assert isinstance(first, fastmaf.GaussianWhitening)
    first.set_(model(6, 2, seed=9))
    assert not torch.equal(twin(x)[1], flow(x)[1])
    assert_close("values", flow.log_prob(x), fastmaf.Flow(6, [whitening(6, 2)]).log_prob(x))


def test_blocks_after_it_see_white_data() -> None:
    """In front of blocks that start as the identity, the flow starts as the fitted normal."""
    flow = build(9, whitening=3, init="identity")
    first = flow.transforms[0]
    assert isinstance(first, fastmaf.GaussianWhitening)
    x = draw(whitening(9, 3), 400)
    assert first.fit_(x) is first
    expected = MultivariateNormal(first.mean, covariance(first)).log_prob(x)
    assert_close("normal", flow.log_prob(x).detach(), expected)
