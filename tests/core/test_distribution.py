"""Flows as distributions: the contracts of torch.distributions, and code that is written for these."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributions as td

import fastmaf
from tests.core.helpers import build, normal
from tests.tolerances import assert_close

D, C = 5, 2


class Shifted(fastmaf.Flow):
    """A flow with a context [..., C], in the form in which conditional flows receive it: x is moved by its sum."""

    context_features = C

    def __init__(self, flow: fastmaf.Flow) -> None:
        super().__init__(flow.features, flow._transforms())

    def log_prob(self, x: Any, context: Any = None) -> Tensor:
        return super().log_prob(x - context.sum(-1, keepdim=True))

    def sample(self, shape: Any = (), context: Any = None, **options: Any) -> Tensor:
        return self.rsample(shape, context, **options).detach()

    def rsample(self, shape: Any = (), context: Any = None, **options: Any) -> Tensor:
        batch = (*shape, *context.shape[:-1])
        return super().rsample(batch, **options) + context.sum(-1, keepdim=True)


def distributions() -> dict[str, fastmaf.FlowDistribution]:
    flow = build(D)
    shifted = Shifted(flow)
    return {
        "plain": flow.distribution(),
        "expanded": flow.distribution().expand([3]),
        "context": shifted.distribution(normal(4, 3, C)),
        "context, expanded": shifted.distribution(normal(3, C)).expand([4, 3]),
        "no batch context": shifted.distribution(normal(C)),
    }


BATCHES = {"plain": (), "expanded": (3,), "context": (4, 3), "context, expanded": (4, 3), "no batch context": ()}
EVERY = pytest.mark.parametrize("name", BATCHES)


@EVERY
@pytest.mark.parametrize("shape", [(), (2,), (2, 0), (6, 1)])
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    d, batch = distributions()[name], BATCHES[name]
    assert d.batch_shape == batch and d.event_shape == (D,) and d.has_rsample
    for draw in (d.sample, d.rsample):
        x = draw(torch.Size(shape))
        assert x.shape == (*shape, *batch, D) and d.log_prob(x).shape == (*shape, *batch)
    assert d.sample().shape == (*batch, D)
    assert not d.sample().requires_grad and d.rsample().requires_grad
    # Values broadcast against the batch shape.
    assert d.log_prob(normal(D)).shape == batch and d.log_prob(normal(7, *(1 for _ in batch), D)).shape == (7, *batch)


@EVERY
def test_values(name: str) -> None:
    """log_prob is the flow's, row by row, and samples of a seed are the flow's."""
    d, batch = distributions()[name], BATCHES[name]
    x = normal(2, *batch, D)
    shift = 0 if d.context is None else d.context.expand(*batch, C).sum(-1, keepdim=True)
    expected = build(D).log_prob(x - shift)
    assert_close("values", d.log_prob(x), expected)
    torch.manual_seed(0)
    found = d.sample((2,))
    torch.manual_seed(0)
    assert_close("inverse", found, build(D).sample((2, *batch)) + shift)


@EVERY
def test_expand(name: str) -> None:
    d = distributions()[name]
    larger = d.expand((6, *d.batch_shape))
    assert type(larger) is type(d) and larger.batch_shape == (6, *d.batch_shape) and larger.flow is d.flow
    assert larger.rsample((2,)).shape == (2, 6, *d.batch_shape, D)
    x = normal(*d.batch_shape, D)
    assert_close("values", larger.log_prob(x), d.log_prob(x).expand(larger.batch_shape))
    with pytest.raises((ValueError, RuntimeError)):
        larger.expand((7, *d.batch_shape))
    with pytest.raises(ValueError, match=r"cannot be expanded to \[5\]"):
        d.expand((4, 3)).expand((5,))


def test_gradients_reach_parameters_and_context() -> None:
    flow, context = Shifted(build(D)), normal(3, C).requires_grad_()
    d = flow.distribution(context)
    d.rsample((4,)).square().sum().backward()
    assert context.grad is not None and bool((context.grad != 0).all())
    assert all(parameter.grad is not None for parameter in flow.parameters())


def test_log_prob_integrates_to_one_and_describes_the_samples() -> None:
    flow = build(2, hidden_features=(8,))
    d = flow.distribution()
    grid = torch.linspace(-12, 12, 601, dtype=torch.float64)
    density = d.log_prob(torch.cartesian_prod(grid, grid)).detach().exp().view(601, 601)
    assert abs(float(torch.trapezoid(torch.trapezoid(density, grid), grid)) - 1) < 1e-3
    inside = float(torch.trapezoid(torch.trapezoid(density[300:, :301], grid[:301]), grid[300:]))
    torch.manual_seed(0)
    x = d.sample((20_000,))
    share = float(((x[:, 0] > 0) & (x[:, 1] < 0)).double().mean())
    assert abs(share - inside) < 5 * (inside * (1 - inside) / 20_000) ** 0.5 + 1e-3


def test_in_torch_distributions() -> None:
    flow = build(D)
    d = flow.distribution()
    x = normal(4, D)
    positive = td.TransformedDistribution(d, [td.transforms.ExpTransform()])
    assert_close("values", positive.log_prob(x.exp()), d.log_prob(x) - x.sum(-1))
    assert bool((positive.rsample((3,)) > 0).all())
    rows = td.Independent(d.expand([4]), 1)
    assert rows.event_shape == (4, D) and rows.sample((2,)).shape == (2, 4, D)
    assert_close("values", rows.log_prob(x), d.log_prob(x).sum())
    mixture = td.MixtureSameFamily(td.Categorical(torch.ones(3, dtype=torch.float64)), d.expand([3]))
    assert_close("values", mixture.log_prob(x), d.log_prob(x))
    assert mixture.sample((6,)).shape == (6, D)


def test_kl_of_a_guide_falls() -> None:
    """Variational inference as one writes it: the gradients of rsample and log_prob bring the flow to its target."""
    target = td.MultivariateNormal(
        torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    )
    flow = build(2, hidden_features=(16,))
    guide = flow.distribution()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(300):
        x = guide.rsample((64,))
        optimizer.zero_grad()
        (guide.log_prob(x) - target.log_prob(x)).mean().backward()
        optimizer.step()
    x = guide.sample((2000,))
    assert float((guide.log_prob(x) - target.log_prob(x)).mean().detach()) < 0.02


def test_support_behind_element_wise_maps() -> None:
    shift, log_scale = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.0, 1.0, -2.0])
    block = fastmaf.AffineAutoregressive(fastmaf.MADE(3, 8))
    affine, order = fastmaf.ElementwiseAffine(shift, log_scale), fastmaf.Permutation([2, 0, 1])
    spline = fastmaf.SplineMap(4, 0.0, 1.0, tails=False)
    no_tails = fastmaf.MonotonicRQS(fastmaf.MADE(3, 8, outputs_per_feature=spline.outputs), spline)
    middle = -shift * (-log_scale).exp()  # what the affine map takes to zero
    size = (-log_scale).exp()
    for bounded in (fastmaf.Logit(3, 0.0), no_tails):
        support = fastmaf.Flow(3, [affine, order, bounded]).distribution().support
        assert bool(support.check(middle + 0.01 * size)) and bool(support.check(middle + 0.99 * size))
        assert not bool(support.check(middle + 1.01 * size)) and not bool(support.check(middle - 0.01 * size))
    behind = fastmaf.Flow(3, [block, fastmaf.Logit(3)]).distribution()
    assert behind.support is td.constraints.real_vector


def test_support_and_validation() -> None:
    assert build(D).distribution().support is td.constraints.real_vector
    for alpha in (0.0, 0.1):
        logit = fastmaf.Logit(3, alpha)
        flow = fastmaf.Flow(3, [fastmaf.Permutation([2, 0, 1]), logit, *build(3, blocks=1)._transforms()])
        d = flow.distribution(validate_args=True)
        edge = torch.full((3,), 1 + alpha / (1 - 2 * alpha), dtype=torch.float64)
        for factor, inside in ((0.999, True), (1.001, False)):
            assert bool(d.support.check(edge * factor)) == inside
            assert bool(torch.isfinite(flow.log_prob(edge * factor))) == inside
        with pytest.raises(ValueError, match="support"):
            d.log_prob(edge * 1.001)
        assert bool(d.support.check(d.sample((50,))).all())
        assert flow.distribution(validate_args=False).log_prob(edge * 1.001) == -torch.inf


def test_copies_and_text() -> None:
    flow = build(D)
    d = flow.distribution()
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert other.flow is not flow
        assert_close("values", other.log_prob(normal(2, D)), d.log_prob(normal(2, D)))
    assert repr(d) == "FlowDistribution(MAF(features=5))"
    assert repr(Shifted(flow).distribution(normal(3, C))) == "FlowDistribution(Shifted(features=5), context=[3, 2])"
    with pytest.raises(TypeError, match="context must be"):
        flow.distribution("a")
    with pytest.raises(ValueError, match="expected no context"):
        flow.distribution(normal(3, C))


def test_conditional_flows_and_bases() -> None:
    """The context of a flow of its own, without a stand-in; samples of a mixture have no gradients."""
    flow = fastmaf.MAF(D, 2, (8, 8), context_features=C, seed=0, dtype=torch.float64)
    context = normal(4, 3, C)
    d = flow.distribution(context)
    x = d.rsample((2,))
    assert x.shape == (2, 4, 3, D)
    assert_close("values", d.log_prob(x), flow.log_prob(x, context.expand(2, 4, 3, C)))
    x.sum().backward()
    with pytest.raises(ValueError, match="expected a context"):
        flow.distribution()
    with pytest.raises(ValueError, match="context must have shape"):
        flow.distribution(normal(4, C + 1))
    mixture = fastmaf.GaussianMixture(D, 2, dtype=torch.float64)
    d = fastmaf.MAF(D, 1, (8,), base=mixture, dtype=torch.float64).distribution()
    assert not d.has_rsample and not d.expand([2]).has_rsample and d.expand([2]).sample().shape == (2, D)
    with pytest.raises(NotImplementedError, match="GaussianMixture"):
        d.rsample()
