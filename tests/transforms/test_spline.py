"""Autoregressive rational-quadratic splines, alone and as transforms of flows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastmaf
from tests.core.helpers import generator, normal
from tests.tolerances import F32, F64, assert_close, error

SPLINES = [
    fastmaf.SplineMap(bins=6, low=-3.0, high=3.0),
    fastmaf.SplineMap(bins=4, low=-2.0, high=4.0, squash=False),
    fastmaf.SplineMap(bins=5, low=0.0, high=1.0, tails=False, squash=False),
    fastmaf.SplineMap(bins=2),
]


def block(
    spline: fastmaf.SplineMap, features: int = 9, dtype: torch.dtype = F64, scale: float = 2.0
) -> fastmaf.MonotonicRQS:
    made = fastmaf.MADE(
        features, (20, 15), outputs_per_feature=spline.outputs, degrees="random", generator=generator(0), dtype=dtype
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
    return fastmaf.MonotonicRQS(made, spline)


def data(spline: fastmaf.SplineMap, n: int, features: int = 9) -> Tensor:
    """Numbers inside of the interval, and outside where that is allowed."""
    middle, width = (spline.low + spline.high) / 2, spline.high - spline.low
    if spline.tails:
        return middle + 0.4 * width * normal(n, features, seed=1)
    return spline.low + width * torch.rand(n, features, generator=generator(1), dtype=F64)


@pytest.mark.parametrize("spline", SPLINES, ids=str)
def test_jacobian_and_inverse(spline: fastmaf.SplineMap) -> None:
    transform, x = block(spline), data(spline, 5)
    z, ladj = transform(x)
    for row, log_det in zip(x, ladj, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: transform(v[None])[0][0], row)
        assert torch.equal(jacobian, jacobian.tril()) and bool((jacobian.diag() > 0).all())
        assert_close("slogdet", torch.linalg.slogdet(jacobian)[1], log_det)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            back, ladj_back = transform.inverse(z)
        assert error(back, x) < 1e-9 and error(ladj_back, -ladj) < 1e-9
    terms = transform.forward_per_dim(x, torch.zeros_like(x))[1]
    assert_close("values", -terms.sum(1), ladj)


def test_the_ends_of_the_interval() -> None:
    """Values on knots, on the ends and beyond; NaN stays NaN."""
    spline = fastmaf.SplineMap(bins=3, low=-1.0, high=1.0)
    x = torch.tensor([-torch.inf, -1e30, -1.0, 0.0, 1.0, 1.5, torch.inf, torch.nan], dtype=F64)
    raw = normal(len(x), spline.outputs, seed=3)
    for values in (spline.forward(x, raw), spline.inverse(x, raw)):
        outside = torch.tensor([0, 1, 5, 6])
        assert torch.equal(values[0][outside], x[outside]) and not values[1][outside].any()
        assert values[0][[2, 4]].tolist() == pytest.approx([-1, 1])
        assert bool(values[0][-1].isnan() & values[1][-1].isnan())
    xs, ys, _ = spline.knots(raw[:1])
    z, _ = spline.forward(xs[0], raw[:1].expand(4, -1))
    torch.testing.assert_close(z, ys[0])
    without = fastmaf.SplineMap(bins=3, low=0.0, high=1.0, tails=False)
    raw = normal(3, without.outputs)
    assert without.forward(torch.tensor([-0.1, 0.5, 1.1], dtype=F64), raw)[0].isnan().tolist() == [True, False, True]


def test_float32_is_as_accurate_as_its_rounding() -> None:
    spline = SPLINES[0]
    x = data(spline, 50).to(F32)
    small, wide = block(spline, dtype=F32, scale=1.0), block(spline, dtype=F32, scale=1.0).double()
    for found, expected in zip(small(x), wide(x.double()), strict=True):
        assert error(found, expected) < 2e-6
    with torch.no_grad():
        z = wide(x.double())[0]
        assert error(small.inverse(z.to(F32))[0], wide.inverse(z.to(F32).double())[0]) < 2e-6


def test_training_and_files(tmp_path: Path) -> None:
    spline = fastmaf.SplineMap(bins=5)
    flow = fastmaf.Flow(9, [block(spline, dtype=F32, scale=1.0), fastmaf.Permutation(torch.arange(9).flip(0))])
    x = torch.rand(200, 9, generator=generator(2)) * 2 - 1
    step = fastmaf.TrainingStep(flow, torch.optim.Adam(flow.parameters(), lr=5e-3))
    losses = [step(x).nll for _ in range(40)]
    assert losses[-1] < losses[0] - 1
    flow.save(tmp_path / "flow.safetensors")
    loaded = fastmaf.load(tmp_path / "flow.safetensors")
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))
    samples, log_prob = loaded.sample_and_log_prob(50, generator=generator(4))
    assert_close("round_trip", log_prob, flow.log_prob(samples))
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        small = flow.to_inference(dtype)
        small.save(tmp_path / "small.safetensors")
        assert torch.equal(fastmaf.load(tmp_path / "small.safetensors").log_prob(x), small.log_prob(x))
        assert 1e-6 < error(small.log_prob(x), flow.log_prob(x).detach()) < 0.2
        (tmp_path / "small.safetensors").unlink()


def test_gradients_of_samples() -> None:
    """Through the inverse, as by the forward pass that undoes it."""
    transform, z = block(SPLINES[0], 4), normal(3, 4, seed=5).requires_grad_()
    x, _ = transform.inverse(z)
    (grad,) = torch.autograd.grad(x.square().sum(), z)
    jacobians = [torch.autograd.functional.jacobian(lambda v: transform(v[None])[0][0], row) for row in x.detach()]
    expected = [torch.linalg.solve(j.T, 2 * row) for j, row in zip(jacobians, x.detach(), strict=True)]
    assert error(grad, torch.stack(expected)) < 1e-9


@pytest.mark.parametrize("spline", SPLINES, ids=str)
def test_gradients_of_samples_and_densities(spline: fastmaf.SplineMap) -> None:
    """Of parameters, too, as by autograd through one call of the network per step; also where only some are trained."""
    transform = block(spline, 7)
    with torch.no_grad():
        z = transform(data(spline, 3, 7))[0].requires_grad_()
    transform.made.output.requires_grad_(False)
    wanted = [z, *(parameter for parameter in transform.parameters() if parameter.requires_grad)]
    assert len(wanted) == 5
    grads = [
        torch.autograd.grad((x * normal(3, 7, seed=6)).sum() + (ladj * normal(3, seed=7)).sum(), wanted)
        for x, ladj in (transform.inverse(z), transform._inverse_by_modules(z, None))
    ]
    for found, expected in zip(*grads, strict=True):
        assert bool(expected.any()) and error(found, expected) < 1e-9


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bins": 0}, "at least one bin; found 0"),
        ({"low": 1.0, "high": 1.0}, "low < high"),
        ({"least": 0.0}, "least must lie between 0 and 1"),
        ({"bins": 10, "squash": False, "least": 0.1}, "least must lie between 0 and 0.1"),
    ],
)
def test_wrong_splines(options: dict[str, float], message: str) -> None:
    spline = fastmaf.SplineMap(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        fastmaf.MonotonicRQS(fastmaf.MADE(3, 8, outputs_per_feature=max(1, spline.outputs)), spline)


def test_wrong_networks() -> None:
    spline = fastmaf.SplineMap(bins=2)
    with pytest.raises(ValueError, match="5 outputs per feature; found 2"):
        fastmaf.MonotonicRQS(fastmaf.MADE(3, 8), spline)
    with pytest.raises(ValueError, match="strict"):
        fastmaf.MonotonicRQS(fastmaf.MADE(3, 8, outputs_per_feature=5, strict=False), spline)
