"""Conditional flows: the context of every method, its shapes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmaf
from tests.core.helpers import build, correlated, generator, normal
from tests.tolerances import F32, assert_close, error


class Shift(fastmaf.Transform):
    """z = x − context · weight: a transform of a user, with a context."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.features, self.context_features = features, size
        self.weight = torch.nn.Parameter(normal(size, features, seed=9))

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return x - context @ self.weight, x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return z + context @ self.weight, z.new_zeros(len(z))

    def forward_per_dim(self, x: Tensor, terms: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, context)[0], terms


def flow_of(features: int = 5, size: int = 2) -> fastmaf.Flow:
    """Conditional and other blocks, transforms without a context, one of a user and one turned round."""
    conditional = build(features, context_features=size, blocks=3)._transforms()
    plain = build(features, blocks=2, seed=1)._transforms()
    inverted = fastmaf.Inverted(build(features, context_features=size, blocks=1, seed=2)._transforms()[0])
    scale = fastmaf.ElementwiseAffine(normal(features), 0.1 * normal(features))
    return fastmaf.Flow(features, [scale, *conditional, Shift(features, size), *plain, inverted])


def test_every_method() -> None:
    flow, x, context = flow_of(), normal(7, 5), normal(7, 2, seed=3)
    z, ladj = flow(x, context)
    back, ladj_back = flow.inverse(z, context)
    assert error(back, x) < 1e-12 and error(ladj_back, -ladj) < 1e-12
    normal_of_z = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    assert_close("values", flow.log_prob(x, context), normal_of_z + ladj)
    changed = flow.log_prob(x, context + 1) - flow.log_prob(x, context)
    assert bool((changed.abs() > 1e-3).all()), "the density does not depend on the context"
    samples, log_prob = flow.sample_and_log_prob((), context, seed=1)
    assert_close("sample_log_prob", log_prob, flow.log_prob(samples, context).detach())
    assert torch.equal(flow.sample((), context, seed=1), samples)
    assert_close("values", flow.rsample((), context, seed=1).detach(), samples)
    maf = build(5, context_features=2)
    assert_close("values", -maf.nll_per_dim(x, context).sum(1), maf.log_prob(x, context))


@pytest.mark.parametrize("of_x, of_context, batch", [
    ((), (), ()),
    ((4,), (), (4,)),
    ((), (4,), (4,)),
    ((4,), (4,), (4,)),
    ((3, 4), (4,), (3, 4)),
    ((3, 1), (4,), (3, 4)),
    ((1,), (4,), (4,)),
    ((2,), (3, 2), (3, 2)),
    ((0,), (1,), (0,)),
    ((5, 0), (5, 1), (5, 0)),
])  # fmt: skip
def test_batch_shapes_broadcast(of_x: tuple[int, ...], of_context: tuple[int, ...], batch: tuple[int, ...]) -> None:
    flow, x, context = build(5, context_features=2), normal(*of_x, 5), normal(*of_context, 2, seed=3)
    rows = x.expand(*batch, 5).reshape(-1, 5), context.expand(*batch, 2).reshape(-1, 2)
    for function in (flow.log_prob, flow.nll_per_dim, flow, flow.inverse):
        found, expected = function(x, context), function(*rows)
        if isinstance(found, Tensor):
            found, expected = (found,), (expected,)
        for one, other in zip(found, expected, strict=True):
            assert one.shape[: len(batch)] == batch
            assert torch.equal(one.reshape(other.shape), other)


@pytest.mark.parametrize("shape", [(), 3, (2, 3), 0])
@pytest.mark.parametrize("of_context", [(), (4,), (2, 1)])
def test_shapes_of_samples(shape: Any, of_context: tuple[int, ...]) -> None:
    """As of a torch distribution whose batch shape is that of the context."""
    flow, context = build(5, context_features=2), normal(*of_context, 2)
    mean = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(*of_context, 5), 1.0), 1)
    expected = mean.sample(shape if isinstance(shape, tuple) else (shape,)).shape
    samples, log_prob = flow.sample_and_log_prob(shape, context, generator=generator())
    assert samples.shape == expected and log_prob.shape == expected[:-1]
    assert_close("sample_log_prob", log_prob, flow.log_prob(samples, context).detach())
    assert torch.equal(flow.sample(shape, context, generator=generator()), samples)


def test_rows_of_a_seed() -> None:
    """Rows are numbered through all contexts; a row depends on its noise and its context alone."""
    flow, context = build(5, context_features=2), normal(4, 2)
    whole = flow.sample(3, context, seed=7).reshape(12, 5)
    assert_close("values", flow.sample((), context[1:3], seed=7, start=5), whole[5:7])
    assert_close("values", flow.sample((), context[2], seed=7, start=10), whole[10])


def test_arrays_and_lists() -> None:
    flow = build(2, context_features=1)
    expected = flow.log_prob(
        torch.tensor([[0.5, 1.0]], dtype=torch.float64), torch.tensor([[2.0]], dtype=torch.float64)
    )
    assert torch.equal(flow.log_prob([[0.5, 1.0]], [[2.0]]), expected)
    assert torch.equal(flow.log_prob(np.array([[0.5, 1.0]]), np.array([2.0])), expected)
    assert flow.sample(3, [2.0]).shape == (3, 2)


@pytest.mark.parametrize("context, message", [
    (None, r"expected a context \[\.\.\., 2\]; found None"),
    (normal(4, 3), r"context must have shape \[\.\.\., 2\]; found \[4, 3\]"),
    (torch.tensor(1.0, dtype=torch.float64), r"context must have shape \[\.\.\., 2\]; found \[\]"),
    (normal(3, 2), r"batch shapes of x and context must broadcast; found x \[4, 5\] and context \[3, 2\]"),
    (normal(4, 2).float(), r"context must be torch.float64 on cpu, like the flow; found torch.float32"),
    (normal(4, 2).log(), r"context must be finite; found . NaN"),
])  # fmt: skip
def test_what_is_refused(context: Any, message: str) -> None:
    flow, x = build(5, context_features=2), normal(4, 5)
    for function in (flow.log_prob, flow, flow.nll_per_dim):
        with pytest.raises(ValueError, match=message):
            function(x, context)
    if "batch shapes" not in message:
        with pytest.raises(ValueError, match=message):
            flow.sample(4, context)
    if "batch shapes" not in message and "finite" not in message and "float32" not in message:
        with pytest.raises(ValueError, match=message):
            flow.transforms[0](x, context)


def test_contexts_that_nothing_takes_are_refused() -> None:
    flow, x, context = build(5), normal(4, 5), normal(4, 2)
    for call in (
        lambda: flow.log_prob(x, context),
        lambda: flow(x, context),
        lambda: flow.inverse(x, context),
        lambda: flow.nll_per_dim(x, context),
        lambda: flow.sample(2, context),
        lambda: flow.transforms[0](x, context),
        lambda: flow.transforms[0].inverse(x, context),  # type: ignore[union-attr, operator]
    ):
        with pytest.raises(ValueError, match=r"expected no context.*found a tensor \[4, 2\]"):
            call()
    with pytest.raises(TypeError, match="context must be a tensor, a NumPy array"):
        build(5, context_features=2).log_prob(x, "a")
    with pytest.raises(ValueError, match=r"contexts of different sizes: found context_features \[2, 3\]"):
        fastmaf.Flow(5, [Shift(5, 2), Shift(5, 3), *flow._transforms()])


def test_densities_that_are_nan_name_their_transform() -> None:
    flow, x, context = flow_of(), normal(4, 5), normal(4, 2)
    with torch.no_grad():
        flow.transforms[0].shift[0] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(FloatingPointError, match="transforms.0.shift"):
        flow.log_prob(x, context)
    huge = torch.finfo(torch.float64).max * torch.ones(4, 2, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"transforms\[\d\] \(Shift"):
        fastmaf.Flow(5, [Shift(5, 2), Shift(5, 2)]).sample((), huge)


def test_a_context_is_read_once_per_call() -> None:
    """Its linear layers are called once, forward and through the inverse."""
    flow, calls = build(9, context_features=2, blocks=1, hidden_features=(12, 9)), []
    made = flow._mades()[0]
    for layer in made.context_layers:
        layer.register_forward_hook(lambda *of: calls.append(of))
    x, context = normal(3, 9), normal(3, 2)
    with torch.no_grad():
        flow.log_prob(x, context)
        assert len(calls) == len(made.layers)
        flow.inverse(x, context)
        assert len(calls) == 2 * len(made.layers)


def test_hooks_are_called() -> None:
    flow, x, context = build(5, context_features=2), normal(4, 5), normal(4, 2)
    expected, back = flow.log_prob(x, context), flow.inverse(x, context)[0]
    seen: list[int] = []
    handles = [module.register_forward_hook(lambda *of: seen.append(1)) for module in flow.modules()]
    assert_close("values", flow.log_prob(x, context).detach(), expected)
    assert_close("values", flow.inverse(x, context)[0].detach(), back)
    assert len(seen) > len(handles)
    assert_close("values", -flow.nll_per_dim(x, context).sum(1).detach(), expected)


def test_flows_of_users_without_a_context_keep_working() -> None:
    class Tempered(fastmaf.MAF):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            z, ladj = super().forward(x)
            return 2 * z, ladj

        def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().inverse(z / 2)

    flow = Tempered(3, 2, 8, seed=0)
    assert flow.log_prob(torch.zeros(2, 3)).shape == (2,) and flow.sample(4).shape == (4, 3)


class TestTraining:
    def test_a_conditional_flow_learns_the_conditional_density(self) -> None:
        """x | c is normal with mean c and −c, and standard deviation 0.5."""
        context = normal(400, 1, dtype=torch.float32)
        x = torch.cat([context, -context], 1) + 0.5 * normal(400, 2, seed=1, dtype=torch.float32)
        flow = fastmaf.MAF(2, 2, 16, context_features=1, activation="silu", seed=0)
        step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-2))
        for _ in range(150):
            report = step(x, context)
        entropy = 2 * (0.5 * np.log(2 * np.pi * np.e) + np.log(0.5))
        assert abs(report.nll - entropy) < 0.15
        samples = flow.sample(2000, [[-1.0], [1.0]], seed=0)
        expected = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
        torch.testing.assert_close(samples.mean(0), expected, atol=0.15, rtol=0)
        torch.testing.assert_close(samples.std(0), torch.full((2, 2), 0.5), atol=0.12, rtol=0)

    def test_what_is_refused(self) -> None:
        flow = build(5, context_features=2)
        optimizer = fastmaf.optim.FusedAdam(flow.parameters())
        with pytest.raises(ValueError, match="expected a context"):
            fastmaf.TrainingStep(flow, optimizer)(normal(4, 5))
        with pytest.raises(ValueError, match="not replayed as CUDA graphs: expected graphs=False"):
            fastmaf.TrainingStep(flow, optimizer, graphs=True)
        with pytest.raises(ValueError, match="not replayed as CUDA graphs: call flow.log_prob"):
            fastmaf.ReplayedLogProb(flow)
        plain = build(5)
        step = fastmaf.TrainingStep(plain, fastmaf.optim.FusedAdam(plain.parameters()))
        with pytest.raises(ValueError, match="expected no context"):
            step(normal(4, 5), normal(4, 2))


def test_save_and_load(tmp_path: Path) -> None:
    flow, x, context = build(5, context_features=2, blocks=2), correlated(6, 5), normal(6, 2)
    flow.save(tmp_path / "flow.safetensors")
    again = fastmaf.load(tmp_path / "flow.safetensors")
    assert again.context_features == 2
    assert_close("values", again.log_prob(x, context).detach(), flow.log_prob(x, context).detach())


def test_contexts_from_an_autocast_region() -> None:
    """What a network upstream made in half precision is converted, by position and by name, in every method."""
    flow, x, half = (
        build(5, context_features=2, order="natural", dtype=F32),
        normal(4, 5, dtype=F32),
        normal(4, 2).bfloat16(),
    )
    known, context = torch.arange(5) < 2, half.float()
    uses: list[Callable[[Tensor], Tensor]] = [
        lambda c: flow.log_prob(x, c),
        lambda c: flow.log_prob(x, context=c),
        lambda c: flow.inverse(x, context=c)[0],
        lambda c: flow.sample(3, c, seed=0),
        lambda c: flow.sample(3, context=c, seed=0),
        lambda c: flow.rsample_and_log_prob(3, context=c, seed=0)[1],
        lambda c: flow.complete(x, known, 3, context=c, seed=0),
        lambda c: flow.distribution(c).log_prob(x),
        lambda c: flow.distribution(context=c).log_prob(x),
    ]
    for use in uses:
        expected = use(context)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(use(half), expected)


@pytest.mark.parametrize("kind", [fastmaf.MAF, fastmaf.IAF])
def test_rows_of_one_expanded_context_have_their_own_gradients(kind: type[fastmaf.MAF]) -> None:
    flow = kind(5, 2, (16,), context_features=2, seed=0, dtype=torch.float64)
    x, context = normal(4, 5), normal(1, 2, seed=3)

    def gradient(context: Tensor, inverse: bool) -> Tensor:
        result = flow.inverse(x, context)[0].square() if inverse else flow.log_prob(x, context)
        return torch.autograd.grad(result.sum(), context)[0]

    for inverse in (False, True):
        expanded = gradient(context.expand(4, 2).requires_grad_(), inverse)
        assert_close("gradients", expanded, gradient(context.repeat(4, 1).requires_grad_(), inverse))
