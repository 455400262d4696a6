"""Logit: densities within (0, 1) and at its edges, and float32 errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmaf
from tests.core.contract import DTYPES, TransformContract, log_normal
from tests.core.helpers import generator, normal
from tests.tolerances import F32, F64, assert_close, assert_float32, distance

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHAS = (0.0, 1e-6, 0.05, 0.3, 0.49)


def uniform(n: int, features: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.rand(n, features, generator=generator(seed), dtype=F64).to(dtype)


class TestContract(TransformContract):
    features = 6

    def transform(self, dtype: torch.dtype = F64) -> fastmaf.Logit:
        return fastmaf.Logit(6)

    fresh = transform

    def data(self, n: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
        return uniform(n, 6, seed, dtype)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_formula(alpha: float) -> None:
    """Each dimension by itself: log N(z) + log dz/dx, with dz/dx = (1 - 2a) / (p (1 - p))."""
    flow = fastmaf.Flow(5, [fastmaf.Logit(5, alpha), fastmaf.GaussianWhitening(5, 0, dtype=F64)])
    x = uniform(20, 5)
    p = alpha + (1 - 2 * alpha) * x
    z = torch.log(p / (1 - p))
    terms = -log_normal(z) - torch.log((1 - 2 * alpha) / (p * (1 - p)))
    assert_close("slogdet", flow(x)[0], z)
    assert_close("slogdet", flow.nll_per_dim(x), terms)
    assert_close("slogdet", flow.log_prob(x), -terms.sum(dim=1))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_density_integrates_to_one(alpha: float) -> None:
    """Over all x that some z comes from: a little more than (0, 1). Of the mass of z, the same part lies within."""
    flow = fastmaf.Flow(1, [fastmaf.Logit(1, alpha), fastmaf.GaussianWhitening(1, 0, dtype=F64)])
    margin = alpha / (1 - 2 * alpha)
    # Where the density is steep, at both ends, the grid is dense: even steps of the sigmoid's argument.
    u = torch.sigmoid(torch.linspace(-14, 14, 8_001, dtype=F64))
    x = u * (1 + 2 * margin) - margin
    density = flow.log_prob(x[:, None]).exp()
    assert abs(float(torch.trapezoid(density, x)) - 1) < 1e-6
    low, high = (float(z) for z in flow(torch.tensor([[0.1], [0.7]], dtype=F64))[0])
    x = torch.linspace(0.1, 0.7, 2_001, dtype=F64)
    expected = 0.5 * (math.erf(high / 2**0.5) - math.erf(low / 2**0.5))
    assert abs(float(torch.trapezoid(flow.log_prob(x[:, None]).exp(), x)) - expected) < 1e-6


@DTYPES
@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.49])
def test_edges_are_within_reach(alpha: float, dtype: torch.dtype) -> None:
    logit, x = fastmaf.Logit(2, alpha), torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], dtype=dtype)
    z, ladj = logit(x)
    assert torch.isfinite(z).all() and torch.isfinite(ladj).all()
    assert (z[x == 0] < 0).all() and (z[x == 1] > 0).all()
    back, _ = logit.inverse(z)
    assert float((back - x).abs().max()) <= 8 * torch.finfo(dtype).eps
    x.requires_grad_()
    z, ladj = logit(x)
    (slopes,) = torch.autograd.grad(z.sum() + ladj.sum(), x)
    assert torch.isfinite(slopes).all()


@DTYPES
@pytest.mark.parametrize("alpha", ALPHAS)
def test_there_is_no_density_outside_of_the_domain(alpha: float, dtype: torch.dtype) -> None:
    """-inf, for that row alone, whatever comes after it; the terms say which dimension it is; NaN stays NaN."""
    margin = alpha / (1 - 2 * alpha)
    values = [-math.inf, -margin - 3.0, -margin - 0.1, 1 + margin + 0.1, math.inf] + ([0.0, 1.0] if alpha == 0 else [])
    after = fastmaf.GaussianWhitening(3, 1, dtype=dtype)
    flow = fastmaf.Flow(3, [fastmaf.Logit(3, alpha), after], validate_args=False)
    x = torch.full((len(values) + 2, 3), 0.4, dtype=dtype)
    x[: len(values), 1] = torch.tensor(values, dtype=dtype)
    x[-1, 1] = math.nan
    inside = flow.log_prob(x[-2:-1])
    assert torch.isfinite(inside).all()
    actual, terms, (z, ladj) = flow.log_prob(x), flow.nll_per_dim(x), fastmaf.Logit(3, alpha)(x)
    assert (actual[:-2] == -math.inf).all() and (ladj[:-2] == -math.inf).all()
    assert_close("values", actual[-2:-1], inside)
    assert torch.isfinite(z[:-1]).all() and z[-1].isnan().tolist() == [False, True, False]
    assert (terms[:-2, 1] == math.inf).all() and torch.isfinite(terms[:-1, ::2]).all()
    assert actual[-1].isnan() and terms[-1, 1].isnan()
    blocks = fastmaf.MAF(3, 2, (8,), seed=0, dtype=dtype).transforms
    deep = fastmaf.Flow(3, [fastmaf.Logit(3, alpha), *blocks])  # type: ignore[list-item]
    finite = x[:-1][x[:-1].isfinite().all(dim=1)]
    assert (deep.log_prob(finite)[:-1] == -math.inf).all() and torch.isfinite(deep.log_prob(finite)[-1])


def test_gradients_of_a_row_outside_are_zero() -> None:
    flow = fastmaf.Flow(2, [fastmaf.Logit(2), fastmaf.GaussianWhitening(2, 0, dtype=F64)])
    x = torch.tensor([[0.3, 1.5], [0.3, 0.5]], dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(flow.log_prob(x).sum(), x)
    assert torch.isfinite(gradient).all() and gradient[0, 1] == 0 and gradient[0, 0] != 0


@DTYPES
@pytest.mark.parametrize("alpha", [*ALPHAS, 1e-8, 0.2])
def test_samples_lie_in_the_domain(alpha: float, dtype: torch.dtype) -> None:
    """The density of samples is finite for arbitrarily distant noise."""
    z = torch.linspace(-200, 200, 4_001, dtype=dtype)[:, None]
    flow = fastmaf.Flow(1, [fastmaf.Logit(1, alpha), fastmaf.GaussianWhitening(1, 0, dtype=dtype)])
    x, _ = flow.inverse(z)
    assert torch.isfinite(flow.log_prob(x)).all()
    assert (x[1:] >= x[:-1]).all()


@DTYPES
def test_the_last_numbers_inside_are_not_moved(dtype: torch.dtype) -> None:
    last = 1 - torch.finfo(dtype).eps / 2
    x = torch.tensor([[last], [torch.finfo(dtype).tiny]], dtype=dtype)
    z, ladj = fastmaf.Logit(1, 0.0)(x)
    assert_close("values", z, torch.logit(x.double()))
    assert torch.isfinite(ladj).all()


@DTYPES
def test_far_away_base_noise(dtype: torch.dtype) -> None:
    """Where the sigmoid is 0 or 1 to rounding, its slope still has a logarithm."""
    z = torch.tensor([[-200.0, 200.0], [-60.0, 60.0], [0.0, 0.0]], dtype=dtype)
    x, ladj = fastmaf.Logit(2, 0.05).inverse(z)
    margin = 0.05 / 0.9
    assert (x >= -margin * (1 + 1e-6)).all() and (x <= 1 + margin * (1 + 1e-6)).all()
    expected = torch.tensor([-400.0, -120.0, -4 * math.log(2)], dtype=F64) - 2 * math.log(0.9)
    assert_close("values", ladj, expected)


@given(
    features=st.integers(1, 20),
    alpha=st.floats(0, 0.499),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([F32, F64]),
)
@settings(max_examples=40)
def test_there_and_back(features: int, alpha: float, seed: int, dtype: torch.dtype) -> None:
    """z is as sensitive to x as 1 / p (1 - p), which is why the bound is of x, in units of its own rounding."""
    logit, x = fastmaf.Logit(features, alpha), uniform(3, features, seed, dtype)
    x = x.clamp(1e-3, 1 - 1e-3)
    z, ladj = logit(x)
    back, ladj_back = logit.inverse(z)
    assert float((back - x).abs().max()) <= 16 * torch.finfo(dtype).eps / (1 - 2 * alpha)
    assert float((ladj + ladj_back).abs().max()) <= 64 * features * torch.finfo(dtype).eps / (1 - 2 * alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.3])
def test_float32(alpha: float) -> None:
    """Float32 errors compared with those of the paper's formula in numpy."""
    features = 257
    logit = fastmaf.Logit(features, alpha)
    errors: dict[str, list[tuple[float, float]]] = {}
    peer: dict[str, list[tuple[float, float]]] = {}

    def by_hand(x: np.ndarray, z: np.ndarray) -> dict[str, np.ndarray]:
        one, a = x.dtype.type(1), x.dtype.type(alpha)
        p = a + (one - 2 * a) * x
        there = np.log(p) - np.log1p(-p)
        ladj = -(np.log(p) + np.log1p(-p) - np.log(one - 2 * a)).sum(axis=1)
        log_prob = ladj + (-there * there / 2 - x.dtype.type(0.5 * math.log(2 * math.pi))).sum(axis=1)
        q = one / (one + np.exp(-z))
        back = np.log(q) + np.log1p(-q) - np.log(one - 2 * a)
        return {"z": there, "ladj": ladj, "log_prob": log_prob, "x": (q - a) / (one - 2 * a), "ladj of x": back.sum(1)}

    for seed in range(6):
        x, z = uniform(33, features, seed, F32), normal(33, features, seed=seed, dtype=F32)
        x = x.clamp(1e-6, 1 - 1e-6)
        flow = fastmaf.Flow(features, [logit])
        actual = dict(zip(("z", "ladj", "x", "ladj of x"), (*flow(x), *flow.inverse(z)), strict=True))
        actual["log_prob"] = flow.log_prob(x)
        other, truth = by_hand(x.numpy(), z.numpy()), by_hand(x.double().numpy(), z.double().numpy())
        for name, value in actual.items():
            expected = torch.from_numpy(truth[name])
            errors.setdefault(name, []).append(distance(value, expected))
            peer.setdefault(name, []).append(distance(torch.from_numpy(other[name]), expected))
    assert_float32(errors, peer)


def test_sums_over_dimensions_are_accurate() -> None:
    """Terms of one sign: added one by one in float32 they would lose digits at image size."""
    features = 100_003
    logit, x = fastmaf.Logit(features, 0.05), uniform(2, features, dtype=F32)
    (_, ladj), (_, exact) = logit(x), logit(x.double())
    assert_close("round_trip", ladj, exact)
    assert float((ladj.double() / exact - 1).abs().max()) <= 4 * torch.finfo(F32).eps


@pytest.mark.parametrize("alpha", [-0.01, 0.5, 1.0, math.nan, math.inf])
def test_other_alphas_are_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha.*\[0, 0.5\).*found {alpha}"):
        fastmaf.Logit(3, alpha)


def test_terms_follow_a_permutation() -> None:
    order = torch.tensor([2, 0, 3, 1])
    there, back = fastmaf.Permutation(order), fastmaf.Permutation(order.argsort())
    scaled = fastmaf.GaussianWhitening(4, 0, dtype=F64)
    scaled.scale.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    scaled.load_state_dict(scaled.state_dict())
    flow = fastmaf.Flow(4, [fastmaf.Logit(4), there, scaled, back])
    x = uniform(6, 4)
    p = 0.05 + 0.9 * x
    widths = scaled.scale[order.argsort()]
    expected = -log_normal(torch.logit(p) / widths) + widths.log() - torch.log(0.9 / (p * (1 - p)))
    assert_close("slogdet", flow.nll_per_dim(x), expected)
