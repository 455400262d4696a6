"""Completion: samples of some dimensions given the others, against densities of the whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.flows.completion import known_along
from fastmaf.noise import normal_rows
from tests.core.helpers import blocks_of, build, correlated, generator, jacobian, normal, train
from tests.tolerances import assert_close

D = 7


def first(k: int, features: int = D) -> Tensor:
    return torch.arange(features) < k


def gaussian_flow(features: int, seed: int = 0) -> fastmaf.MAF:
    """Returns a MAF of linear networks: all units are far within the linear part of the ReLU, log-scales constant."""
    flow = build(features, hidden_features=(9, 11), order="natural", seed=seed)
    with torch.no_grad():
        for block in blocks_of(flow):
            for layer in block.made.hidden:
                layer.bias.add_(100.0)
            layout = block.made.output.layout
            dense = layout.unpack(block.made.output.weight)
            dense[1::2] = 0
            block.made.output.weight.copy_(layout.pack(dense))
    return flow


def test_completions_of_a_gaussian_have_its_conditional_moments() -> None:
    features, k, n = 5, 2, 20_000
    flow = gaussian_flow(features)
    zero = torch.zeros(features, dtype=torch.float64)
    mean, factor = flow.inverse(zero[None])[0][0].detach(), jacobian(lambda z: flow.inverse(z)[0], zero)
    assert_close("inverse", flow.inverse(normal(3, features))[0], normal(3, features) @ factor.T + mean)
    covariance = factor @ factor.T
    x = normal(features, seed=1)
    slope = torch.linalg.solve(covariance[:k, :k], covariance[:k, k:]).T
    expected_mean = mean[k:] + slope @ (x[:k] - mean[:k])
    expected = covariance[k:, k:] - slope @ covariance[:k, k:]
    found = flow.complete(x, first(k, features), n, seed=0)[:, k:]
    # Five standard errors of each moment.
    errors = expected.diagonal().sqrt()
    assert ((found.mean(0) - expected_mean).abs() < 5 * errors / n**0.5).all()
    assert ((found.T.cov() - expected).abs() < 5 * (2 / n) ** 0.5 * errors[:, None] * errors).all()


@pytest.fixture(scope="module")
def curved() -> fastmaf.MAF:
    """A trained flow of three dimensions in the order 2, 0, 1, each conditioned on squares of those before."""
    flow = build(3, hidden_features=(16, 16), blocks=3, order=[torch.tensor([2, 0, 1])] * 3, log_scale_bound=2.0)
    base = normal(2000, 3)
    middle = base[:, 2] ** 2 + 0.5 * base[:, 0]
    train(flow, torch.stack((middle, 0.5 * middle**2 + 0.3 * base[:, 1], base[:, 2]), dim=1))
    return flow.requires_grad_(False)


def test_the_log_density_of_a_completion_is_that_of_quadrature(curved: fastmaf.MAF) -> None:
    known, grid = torch.tensor([True, False, True]), torch.linspace(-60, 60, 20_001, dtype=torch.float64)
    for row in (normal(3), torch.tensor([1.5, math.nan, -1.0], dtype=torch.float64)):
        rows = row.expand(len(grid), 3).clone()
        rows[:, 1] = grid
        of_known = torch.trapezoid(curved.log_prob(rows).exp(), grid).log()
        found = curved.complete(row, known, 50, seed=0)
        conditional = -curved.nll_per_dim(found)[:, ~known].sum(-1)
        assert (conditional - (curved.log_prob(found) - of_known)).abs().max() < 1e-9


def test_completions_follow_the_conditional_density(curved: fastmaf.MAF) -> None:
    """Of one known dimension, the last one's distribution function is found by quadrature over the other two."""
    n, known = 1000, torch.tensor([False, False, True])
    middle, last = (torch.linspace(*ends, dtype=torch.float64) for ends in ((-6, 10, 321), (-15, 40, 551)))
    for value in (-1.0, 0.3):
        rows = torch.cartesian_prod(last, middle, torch.tensor([value], dtype=torch.float64))[:, [1, 0, 2]]
        density = torch.trapezoid(curved.log_prob(rows).exp().view(len(last), len(middle)), middle)
        cdf = torch.cumulative_trapezoid(density, last) / torch.trapezoid(density, last)
        x = torch.tensor([math.nan, math.nan, value], dtype=torch.float64)
        found = curved.complete(x, known, n, seed=3)[:, 1].sort().values
        place = torch.searchsorted(last[1:-1], found)
        part = (found - last[place]) / (last[1] - last[0])
        uniform = torch.lerp(torch.cat((cdf.new_zeros(1), cdf))[place], cdf[place], part)
        distance = (uniform - (torch.arange(n) + 0.5) / n).abs().max()
        assert distance < 1.95 / n**0.5, "Kolmogorov-Smirnov, one in a thousand"


@pytest.mark.parametrize("order", ["natural", "alternate", "random"])
def test_nothing_known_is_a_sample_and_everything_is_x(order: str) -> None:
    flow, x = build(D, order=order, whitening=2), normal(3, D)
    sample = flow.sample((4, 3), seed=5, start=2)
    assert torch.equal(flow.complete(x * math.nan, first(0), 4, seed=5, start=2), sample)
    assert torch.equal(flow.complete(x, first(D), 4), x.expand(4, 3, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_dimensions_come_back_and_the_rest_is_the_inverse_of_the_noise(dtype: torch.dtype) -> None:
    flow = build(D, hidden_features=(16, 16), order="natural", dtype=dtype)
    train(flow, correlated(256, D, dtype=dtype), steps=30)
    x, k = correlated(3, D, seed=1, dtype=dtype), 4
    noise = normal_rows(6, D, 1, 0, like=x).view(2, 3, D)
    found = flow.complete(torch.where(first(k), x, math.nan), first(k), 2, seed=1)
    assert found.shape == (2, 3, D) and found.dtype == dtype
    assert torch.equal(found[..., :k], x[:, :k].expand(2, 3, k))
    z, _ = flow.forward(found)
    assert_close("inverse", z[..., k:], noise[..., k:])
    assert_close("inverse", z[..., :k], flow.forward(x)[0][:, :k].expand(2, 3, k))


def test_shapes_and_sources_of_noise() -> None:
    flow, known = build(D, order="natural"), first(3)
    x = normal(2, 3, D)
    assert flow.complete(x, known).shape == (2, 3, D)
    assert flow.complete(x[0, 0], known, (4, 5)).shape == (4, 5, D)
    assert flow.complete(x[:0], known, 4).shape == (4, 0, 3, D) and flow.complete(x, known, 0).shape == (0, 2, 3, D)
    assert flow.complete(x.tolist(), known.tolist(), generator=generator(1)).shape == x.shape
    one, other = (flow.complete(x, known, generator=generator(1)) for _ in range(2))
    assert torch.equal(one, other)
    assert_close("inverse", flow.complete(x[0], known, 3, seed=1)[1:], flow.complete(x[0], known, 2, seed=1, start=3))
    assert not flow.complete(x.clone().requires_grad_(), known).requires_grad


def chain(*, spline: bool = False) -> fastmaf.Flow:
    """Returns a flow of many kinds of transforms, in which dimensions 1, 4 and 2 come first."""
    make: dict[str, Any] = {"dtype": torch.float64, "generator": generator(0)}
    kind = fastmaf.SplineMap(bins=4)
    made = fastmaf.MADE(D, (24, 20), outputs_per_feature=kind.outputs if spline else 2, **make)
    blocks = [fastmaf.AffineAutoregressive(fastmaf.MADE(D, (24, 20), **make)) for _ in range(2)]
    middle = fastmaf.MonotonicRQS(made, kind) if spline else fastmaf.AffineAutoregressive(made)
    orders = [torch.tensor([1, 4, 2, 0, 3, 5, 6]), torch.tensor([2, 1, 0, 6, 5, 4, 3])]
    return fastmaf.Flow(
        D,
        [
            fastmaf.Logit(D),
            fastmaf.Permutation(orders[0]),
            blocks[0],
            fastmaf.ElementwiseAffine(normal(D), normal(D, seed=1)),
            fastmaf.Inverted(fastmaf.Permutation(orders[1])),
            middle,
            fastmaf.Inverted(blocks[1]),
        ],
    )


@pytest.mark.parametrize("spline", [False, True])
def test_chains_of_transforms(spline: bool) -> None:
    flow, x = chain(spline=spline), torch.rand(4, D, generator=generator(0), dtype=torch.float64)
    known = torch.isin(torch.arange(D), torch.tensor([1, 4, 2]))
    found = flow.complete(torch.where(known, x, math.nan), known, seed=1)
    assert torch.equal(found[:, known], x[:, known])
    after = known_along(list(flow.transforms), known)[-1]
    noise = normal_rows(4, D, 1, 0, like=x)
    assert_close("inverse", found, flow.inverse(torch.where(after, flow(x)[0], noise))[0])
    with pytest.raises(ValueError, match=r"transforms\[2\] .*dimension 0, which is known, depend on dimension 1"):
        flow.complete(x, first(1))


def test_accepted_masks_keep_known_numbers_apart() -> None:
    """Where a mask is accepted, the Jacobian says that known z depend on known x alone; where not, that they do not."""
    counts = {True: 0, False: 0}
    for seed in range(60):
        draw = generator(seed)
        orders = [torch.randperm(5, generator=draw) for _ in range(2)]
        if seed % 2:
            orders[1] = torch.cat((orders[0][:2].flip(0), orders[0][2:].flip(0)))
        flow = build(5, hidden_features=(40, 30), degrees="random", levels=1 + seed % 4, order=orders, seed=seed)
        known = torch.isin(torch.arange(5), orders[0][: 1 + seed % 3])
        slopes = jacobian(lambda x, flow=flow: flow(x)[0], normal(5, seed=seed))
        apart = bool((slopes[known][:, ~known] == 0).all())
        try:
            flow.complete(normal(5), known)
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == apart, seed
        counts[accepted] += 1
    assert min(counts.values()) > 10


@pytest.mark.parametrize("sizes, rows", [((4,), 0), ((0,), 3), ((2, 0), 0)])
def test_no_completions_of_contexts(sizes: tuple[int, ...], rows: int) -> None:
    flow = build(D, order="natural", context_features=2)
    found = flow.complete(normal(rows, D), first(3), sizes, normal(rows, 2))
    assert found.shape == (*sizes, rows, D)


def test_refusals() -> None:
    x, known = normal(2, D), first(3)
    with pytest.raises(ValueError, match="dimension 0, which is known, depend on dimension 6, .*order='natural'"):
        build(D, hidden_features=32, order="alternate").complete(x, known)
    with pytest.raises(ValueError, match=r"transforms\[0\] \(GaussianWhitening\)"):
        build(D, order="natural", whitening=1).complete(x, known)
    for wrong in (known[1:], known.long(), [0, 1], None, [[True], [True, False]]):
        with pytest.raises(ValueError, match=r"known must be a mask of bool \[7\]"):
            build(D, order="natural").complete(x, wrong)
    with pytest.raises(ValueError, match="known part of x must be finite"):
        build(D, order="natural").complete(x * math.nan, known)
    with pytest.raises(fastmaf.NotInvertibleError):
        build(D, order="natural", strict=False).complete(x, known)

    class OtherBase(fastmaf.MAF):
        def _base_log_prob(self, z: Tensor) -> Tensor:
            return -z.abs().sum(1)

    flow = build(D, order="natural", base=fastmaf.StudentT(D, 4.0))
    with pytest.raises(ValueError, match="standard normal base; found that of StudentT"):
        flow.complete(x, known)
    with pytest.raises(ValueError, match=r"must broadcast; found x \[2, 7\] and context \[3, 2\]"):
        build(D, order="natural", context_features=2).complete(x, known, context=normal(3, 2))
    with pytest.raises(ValueError, match="base.*OtherBase"):
        OtherBase(D, 1, 8, order="natural", dtype=torch.float64).complete(x, known)


@pytest.mark.parametrize("normalization", ["act", "batch"])
def test_contexts_dropout_and_normalisations(normalization: str) -> None:
    """Completions of a context are those of the noise, as in evaluation; normalisations in training are refused."""
    flow = fastmaf.MAF(
        D, 2, (16, 16), order="natural", seed=0, dtype=torch.float64, context_features=2, dropout=0.5,
        normalization=normalization,
    )  # fmt: skip
    context, x, known = normal(3, 2), normal(3, D, seed=1), first(4)
    before = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    for some in (known, first(0), first(D)):
        with pytest.raises(ValueError, match="Norm.*eval"):
            flow.complete(x, some, context=context)
    assert all(torch.equal(tensor, before[name]) for name, tensor in flow.state_dict().items())
    flow(normal(64, D, seed=2), normal(64, 2, seed=3))  # starts the normalisation
    flow.eval()
    with pytest.raises(ValueError, match="must broadcast"):
        flow.complete(x, known, context=context[:2])
    found = flow.complete(x, known, (5,), context, seed=4)
    assert found.shape == (5, 3, D) and torch.equal(found[..., :4], x[:, :4].expand(5, 3, 4))
    z = flow(found, context)[0]
    assert_close("values", z[..., :4], flow(x, context)[0][..., :4].expand(5, 3, 4))
    assert_close("inverse", z[..., 4:], normal_rows(15, D, 4, 0, x).view(5, 3, D)[..., 4:])
    for module in flow.modules():  # dropout alone stays in training
        if isinstance(module, fastmaf.MADE):
            module.train()
    assert torch.equal(flow.complete(x, known, (5,), context, seed=4), found)


@pytest.mark.parametrize("kind", [fastmaf.MAF, fastmaf.IAF])
def test_dropout_is_left_out(kind: type[fastmaf.MAF]) -> None:
    flow = kind(D, 2, (16, 16), order="natural", seed=0, dtype=torch.float64, dropout=0.5)
    x = normal(3, D)
    found = flow.complete(x, first(4), 2, seed=1)
    assert all(made.training for made in flow._mades())
    assert torch.equal(flow.eval().complete(x, first(4), 2, seed=1), found)
