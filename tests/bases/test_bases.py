"""Base distributions: their densities against torch and SciPy, their samples, and flows that have one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch import distributions as dist

import fastmaf
from tests.core.helpers import generator, normal
from tests.tolerances import F32, F64, assert_close, error

D = 5


def spread(base: fastmaf.Base, seed: int = 3) -> fastmaf.Base:
    """Returns the base with other parameters, so that none is at its start."""
    with torch.no_grad():
        for k, tensor in enumerate(base.state_dict().values()):
            tensor.add_(normal(*tensor.shape, seed=seed + k).to(tensor), alpha=0.7)
    return base


MAKE: dict[str, Callable[..., fastmaf.Base]] = {
    "standard": lambda features, dtype: fastmaf.StandardNormal(features),
    "diagonal": lambda features, dtype: spread(fastmaf.DiagonalGaussian(features, dtype=dtype)),
    "fixed": lambda features, dtype: spread(fastmaf.DiagonalGaussian(features, trainable=False, dtype=dtype)),
    "low rank": lambda features, dtype: spread(
        fastmaf.LowRankGaussian(features, max(1, features // 2), generator=generator(), dtype=dtype)
    ),
    "student": lambda features, dtype: spread(fastmaf.StudentT(features, 3.0, dtype=dtype)),
    "mixture": lambda features, dtype: spread(fastmaf.GaussianMixture(features, 3, generator=generator(), dtype=dtype)),
}
NAMES = list(MAKE)


def of_torch(base: Any) -> Callable[[Tensor], Tensor]:
    """Returns the log-density of torch.distributions with the parameters of a base."""
    one: Any
    if isinstance(base, fastmaf.StandardNormal):
        one = dist.Independent(dist.Normal(torch.zeros(base.features, dtype=F64), 1.0), 1)
    elif isinstance(base, fastmaf.DiagonalGaussian):
        one = dist.Independent(dist.Normal(base.loc, base.log_scale.exp()), 1)
    elif isinstance(base, fastmaf.LowRankGaussian):
        one = dist.LowRankMultivariateNormal(base.loc, base.factors, (2 * base.log_scale).exp())
    elif isinstance(base, fastmaf.StudentT):
        one = dist.Independent(dist.StudentT(base.log_df.exp(), base.loc, base.log_scale.exp()), 1)
    else:
        parts = dist.Independent(dist.Normal(base.loc, base.log_scale.exp()), 1)
        one = dist.MixtureSameFamily(dist.Categorical(logits=base.logits), parts)
    return one.log_prob  # type: ignore[no-any-return]


@pytest.mark.parametrize("features", [1, 2, 7])
@pytest.mark.parametrize("batch", [0, 1, 9])
@pytest.mark.parametrize("name", NAMES)
def test_densities_are_those_of_torch(name: str, batch: int, features: int) -> None:
    base, z = MAKE[name](features, F64), (3 * normal(batch, features)).requires_grad_()
    found = base.log_prob(z)
    assert found.shape == (batch,)
    if not batch:  # torch's own refuse it
        return
    expected = of_torch(base)(z)
    assert_close("values", found, expected)
    leaves = [z, *base.parameters()]
    grads = [torch.autograd.grad(value.sum(), leaves) for value in (found, expected)]
    for one, other in zip(*grads, strict=True):
        assert error(one, other) < 1e-11


def test_densities_are_those_of_scipy() -> None:
    z = 3 * normal(9, D)
    base: Any = MAKE["student"](D, F64)
    loc, scale, df = (t.detach().numpy() for t in (base.loc, base.log_scale.exp(), base.log_df.exp()))
    expected = stats.t.logpdf(z.numpy(), df, loc, scale)
    np.testing.assert_allclose(-base.nll_per_dim(z, torch.zeros_like(z)).detach().numpy(), expected, rtol=1e-12)
    base = MAKE["low rank"](D, F64)
    covariance = (base.factors @ base.factors.T + (2 * base.log_scale).exp().diag()).detach().numpy()
    expected = stats.multivariate_normal(base.loc.detach().numpy(), covariance).logpdf(z.numpy())
    np.testing.assert_allclose(base.log_prob(z).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_dimensions_add_up(name: str) -> None:
    base, z, terms = MAKE[name](D, F64), normal(4, D), normal(4, D, seed=1)
    if name in ("low rank", "mixture"):
        with pytest.raises(NotImplementedError, match=f"{type(base).__name__} does not define how"):
            base.nll_per_dim(z, terms)
    else:
        assert_close("values", base.nll_per_dim(z, terms).sum(1), terms.sum(1) - base.log_prob(z))


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_distribution(name: str) -> None:
    """By the probability integral transform of each dimension, at a level of 1e-3 for each of five."""
    base: Any = MAKE[name](D, F64)
    x = base.sample(20_000, generator=generator(1)).numpy()
    with torch.no_grad():
        for d in range(D):
            if name == "standard":
                cdf = stats.norm.cdf(x[:, d])
            elif name == "student":
                loc, scale, df = (float(t[d]) for t in (base.loc, base.log_scale.exp(), base.log_df.exp()))
                cdf = stats.t.cdf(x[:, d], df, loc, scale)
            elif name == "low rank":
                variance = float((2 * base.log_scale[d]).exp() + base.factors[d].square().sum())
                cdf = stats.norm.cdf(x[:, d], float(base.loc[d]), variance**0.5)
            else:
                weights = base.logits.softmax(0) if name == "mixture" else torch.ones(1)
                loc, scale = base.loc.reshape(-1, D)[:, d], base.log_scale.exp().reshape(-1, D)[:, d]
                cdf = (weights.numpy() * stats.norm.cdf(x[:, d, None], loc.numpy(), scale.numpy())).sum(1)
            assert stats.kstest(cdf, "uniform").pvalue > 1e-3
        if name == "low rank":
            covariance = base.factors @ base.factors.T + (2 * base.log_scale).exp().diag()
            assert error(torch.from_numpy(np.cov(x.T)), covariance) < 0.05


@pytest.mark.parametrize("df", [0.5, 2.0, 30.0])
def test_the_derivative_of_a_student_t_sample(df: float) -> None:
    """The derivative of the mean of f(y) with respect to log ν, against a difference of SciPy's quantiles."""
    base, noise, h = fastmaf.StudentT(1, df, dtype=F64), normal(100_000, 2), 1e-3
    grid = (np.arange(20_000) + 0.5) / 20_000
    y, above, below = base.from_noise(noise), *(stats.t.ppf(grid, df * math.exp(s)) for s in (h, -h))
    (found,) = torch.autograd.grad((y.square() / 4).tanh().mean(), base.log_df)
    expected = (np.tanh(above**2 / 4) - np.tanh(below**2 / 4)).mean() / (2 * h)
    assert float(found) == pytest.approx(expected, abs=2e-3)
    assert torch.autograd.gradcheck(base.from_noise, noise[:4].requires_grad_())


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("log_df", [-5.0, 0.0, 5.2, 5.4, 14.0, 30.0])
def test_a_student_t_of_any_degrees_of_freedom(log_df: float, dtype: torch.dtype) -> None:
    base = fastmaf.StudentT(1, 1.0, dtype=dtype)
    with torch.no_grad():
        base.log_df.fill_(log_df)
    z = torch.tensor([[0.0], [1e-6], [1.0], [3.0], [50.0], [1e30]], dtype=dtype, requires_grad=True)
    df = math.exp(base.log_df.item())
    # SciPy's own loses digits at large df, where the normal density is right to 1/df.
    known = stats.t(df).logpdf if log_df < 20 else stats.norm.logpdf
    found = base.log_prob(z)
    rows = slice(None) if log_df < 20 else slice(0, 4)
    expected = torch.from_numpy(known(z.detach().double().numpy()))[rows, 0]
    torch.testing.assert_close(found[rows].double(), expected, rtol=1e-11 if dtype == F64 else 5e-6, atol=1e-12)
    (slope,) = torch.autograd.grad(found.sum(), z)
    values = z.detach().double()
    expected = -(df + 1) * values / (df + values.square())
    torch.testing.assert_close(slope.double(), expected, rtol=1e-11 if dtype == F64 else 5e-6, atol=0)


def test_a_strong_factor_keeps_its_digits_in_float32() -> None:
    base = fastmaf.LowRankGaussian(40, 2, generator=generator(), dtype=F64)
    with torch.no_grad():
        base.factors.mul_(1e4)
    z = base.sample(20, generator=generator(1)).float().double()
    assert error(copy.deepcopy(base).float().log_prob(z.float()), base.log_prob(z)) < 1e-4


def flow_of(base: fastmaf.Base | None, dtype: torch.dtype = F64, **options: Any) -> fastmaf.MAF:
    return fastmaf.MAF(D, 2, 16, seed=0, base=base, dtype=dtype, **options)


@pytest.mark.parametrize("name", NAMES)
def test_flows_with_a_base(name: str, tmp_path: Path) -> None:
    flow, x = flow_of(MAKE[name](D, F64)), normal(6, D)
    z, ladj = flow(x)
    assert_close("values", flow.log_prob(x), of_torch(flow.base)(z) + ladj)
    assert torch.equal(flow.log_prob(x.reshape(2, 3, D)).flatten(), flow.log_prob(x))
    if name not in ("low rank", "mixture"):
        assert_close("values", -flow.nll_per_dim(x).sum(1), flow.log_prob(x))
    sample, log_prob = flow.sample_and_log_prob((2, 4), seed=1)
    assert_close("sample_log_prob", log_prob, flow.log_prob(sample))
    rows = flow.sample(5, seed=1, start=3)
    assert error(rows, sample.reshape(-1, D)[3:]) < 1e-13, "a row depends on the batch that it is drawn in"
    path = tmp_path / "flow.safetensors"
    flow.save(path)
    state = torch.random.get_rng_state()
    again = fastmaf.load(path)
    assert torch.equal(torch.random.get_rng_state(), state), "loading draws numbers"
    assert type(again) is fastmaf.MAF and type(again.base) is type(flow.base)
    assert torch.equal(again.log_prob(x), flow.log_prob(x)) and torch.equal(
        again.sample(3, seed=2), flow.sample(3, seed=2)
    )
    assert len([*again.parameters()]) == len([*flow.parameters()])
    other = flow_of(MAKE[name](D, F64)).requires_grad_(False)
    for tensor in other.state_dict().values():
        if tensor.is_floating_point():
            tensor.zero_()
    other.load_state_dict(flow.state_dict())
    for twin in (other, copy.deepcopy(flow), flow.to_inference(F64)):
        assert torch.equal(twin.log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize("name", NAMES)
def test_training_and_differentiable_samples(name: str) -> None:
    flow = flow_of(MAKE[name](D, F64))
    optimizer = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2)
    step = fastmaf.TrainingStep(flow, optimizer, fastmaf.Guards(max_grad_norm=10.0))
    x = 2 * normal(64, D) + 1
    losses = [step(x).nll for _ in range(30)]
    assert losses[-1] < losses[0]
    if name == "mixture":
        with pytest.raises(NotImplementedError, match="samples of a GaussianMixture are not differentiable"):
            flow.rsample(3)
        return
    x, log_prob = flow.rsample_and_log_prob(4, seed=0)
    grads = torch.autograd.grad((log_prob - x.square().sum(1)).mean(), list(flow.parameters()), allow_unused=False)
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_the_default_is_the_standard_normal() -> None:
    default, explicit, x = flow_of(None), flow_of(fastmaf.StandardNormal(D)), normal(4, D)
    assert torch.equal(default.log_prob(x), explicit.log_prob(x)) and default.has_standard_base
    assert "base" not in default.config() and not any(name.startswith("base") for name in default.state_dict())
    state = {**vars(default), "_modules": {"transforms": default.transforms}}
    former = fastmaf.MAF.__new__(fastmaf.MAF)
    former.__setstate__(state)  # as flows were pickled before there were bases
    assert torch.equal(former.log_prob(x), default.log_prob(x))
    assert torch.equal(former.sample(3, seed=0), default.sample(3, seed=0))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match=r"base must be a fastmaf\.Base; found float"):
        fastmaf.MAF(3, 1, 8, base=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"base must be a fastmaf\.Base; found Linear"):
        fastmaf.Flow(D, [], torch.nn.Linear(D, D))  # type: ignore[arg-type]
    for other, found in (("normal", "str"), (fastmaf.StudentT, "type")):
        with pytest.raises(TypeError, match=rf"base must be a fastmaf\.Base; found {found}"):
            fastmaf.MAF(D, 1, 8, base=other)  # type: ignore[arg-type]
    for number in (2.5, "2"):
        with pytest.raises(TypeError, match=f"components must be an integer; found {number!r}"):
            fastmaf.GaussianMixture(3, number)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"base \(StudentT\) has 4 features, the flow 5"):
        flow_of(fastmaf.StudentT(4, 1.0))
    with pytest.raises(ValueError, match=r"base \(StudentT\): loc is torch\.float32, the transforms torch\.float64"):
        fastmaf.Flow(D, list(flow_of(None).transforms), fastmaf.StudentT(D, 1.0))  # type: ignore[arg-type]
    assert flow_of(fastmaf.StudentT(D, 1.0)).log_prob(normal(2, D)).dtype == F64, "a MAF converts its base"
    for make, words in (
        (lambda: fastmaf.StudentT(3, 0.0), "df must be finite and positive; found 0.0"),
        (lambda: fastmaf.StudentT(3, torch.ones(4)), r"df must be a number or have shape \[3\]; found \[4\]"),
        (lambda: fastmaf.DiagonalGaussian(3, scale=-1.0), "scale must be finite and positive"),
        (lambda: fastmaf.DiagonalGaussian(3, math.nan), "loc must be finite; found nan"),
        (lambda: fastmaf.DiagonalGaussian(0), "features must be at least 1; found 0"),
        (lambda: fastmaf.LowRankGaussian(3, 4), "rank must be 1 to 3; found 4"),
        (lambda: fastmaf.GaussianMixture(3, 0), "components must be at least 1; found 0"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    flow = flow_of(fastmaf.StudentT(D, 1.0, dtype=F64))
    with pytest.raises(TypeError, match="a naive MAF has a standard normal base; found StudentT"):
        flow.to_naive()

    class Own(fastmaf.StandardNormal):
        pass

    with pytest.raises(TypeError, match=r"Own cannot be saved: list it in fastmaf\.bases\.BASES"):
        flow_of(Own(D)).config()


def test_inspection_refuses_another_base() -> None:
    from fastmaf.inspection.scoring.float64_flow import Float64Flow

    with pytest.raises(ValueError, match="inspection needs a flow with a standard normal base; found StudentT"):
        Float64Flow(flow_of(fastmaf.StudentT(D, 1.0, dtype=F64)))


def test_samples_that_overflow_are_refused() -> None:
    flow = flow_of(fastmaf.StudentT(D, 1e-3, dtype=F32), dtype=F32)
    with pytest.raises(FloatingPointError, match=r"the number that the base \(StudentT\) drew overflows torch.float32"):
        flow.sample(5, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_by_functional_transforms(name: str) -> None:
    flow, x = flow_of(MAKE[name](D, F64)), normal(3, D).requires_grad_()
    found = torch.func.vmap(torch.func.grad(lambda row: flow.log_prob(row[None])[0]))(x.detach())
    assert_close("gradients", found, torch.autograd.grad(flow.log_prob(x).sum(), x)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_densities(name: str) -> None:
    flow, x = flow_of(MAKE[name](D, F64)), normal(3, D)
    try:
        torch.compiler.reset()
        compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
        assert_close("values", compiled(x), flow.log_prob(x))
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str) -> None:
    flow, x = flow_of(MAKE[name](D, F32), F32), normal(3, D, dtype=F32)
    results = [(flow.log_prob(x), *flow.sample_and_log_prob(4, seed=0))]
    with torch.autocast("cpu", torch.bfloat16):
        results.append((flow.log_prob(x), *flow.sample_and_log_prob(4, seed=0)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
