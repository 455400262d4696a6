"""Numbers under stress: a result is right or an error names the cause; no NaN leaves ``log_prob`` or ``sample``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from tests.core.helpers import blocks_of, generator
from tests.tolerances import assert_close

D = 12
_SPLINE = fastmaf.SplineMap(8)
FLOWS: dict[str, Callable[[], fastmaf.Flow]] = {
    "MAF": lambda: fastmaf.MAF(D, 3, (16,), seed=0),
    "soft bound": lambda: fastmaf.MAF(D, 3, (16,), seed=0, soft_bound=True),
    "no bound": lambda: fastmaf.MAF(D, 3, (16,), seed=0, log_scale_bound=None),
    "ELU": lambda: fastmaf.MAF(D, 2, (16,), seed=0, activation="elu"),
    "whitened": lambda: fastmaf.MAF(D, 2, (16,), seed=0, whitening=3),
    "batch norm": lambda: fastmaf.MAF(D, 2, (16,), seed=0, normalization="batch").eval(),
    "act norm": lambda: fastmaf.MAF(D, 2, (16,), seed=0, normalization="act").eval(),
    "IAF": lambda: fastmaf.IAF(D, 2, 16, seed=0),
    "Student's t": lambda: fastmaf.MAF(D, 2, (16,), seed=0, base=fastmaf.StudentT(D, 4.0)),
    "mixture": lambda: fastmaf.MAF(D, 2, (16,), seed=0, base=fastmaf.GaussianMixture(D, 2, generator=generator())),
    "low rank": lambda: fastmaf.MAF(D, 2, (16,), seed=0, base=fastmaf.LowRankGaussian(D, 2, generator=generator())),
    "spline": lambda: fastmaf.Flow(
        D, [fastmaf.MonotonicRQS(fastmaf.MADE(D, (16,), outputs_per_feature=_SPLINE.outputs), _SPLINE)]
    ),
    "logit": lambda: fastmaf.Flow(D, [fastmaf.Logit(D, 0.05)]),
    "local": lambda: fastmaf.Flow(D, [fastmaf.LocalAutoregressive((3, 2, 2), hidden=1, generator=generator())]),
}
pytestmark = pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")


def without_nan(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> bool:
    """Returns whether a call has a result, which must be free of NaN; an error must name a cause."""
    try:
        found = call()
    except (ValueError, ArithmeticError) as error:
        assert len(str(error)) > 20
        return False
    for tensor in found if isinstance(found, tuple) else (found,):
        assert not bool(torch.isnan(tensor).any())
    return True


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_inputs(name: str) -> None:
    flow = FLOWS[name]()
    for value in (0.0, 1e-40, -1e-40, 1e19, 1e30, -1e30, 3e38, math.nan, math.inf, -math.inf):
        one = torch.full((3, D), 0.4)
        one[1, 4] = value
        taken = [without_nan(lambda x=x: flow.log_prob(x)) for x in (one, torch.full((3, D), value))]
        assert not any(taken) or math.isfinite(value), "what is not finite is refused"
        if abs(value) < 1e-30 and name != "logit":
            assert all(taken)
            torch.testing.assert_close(flow.log_prob(one), flow.log_prob(one.where(one.abs() > 1e-30, 0.0)))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("MAF", "whitened", "Student's t")))
        for name in FLOWS
        if name != "logit"  # has none
    ],
)
@torch.no_grad()
def test_parameters(name: str) -> None:
    """Each parameter in turn has one such number in its middle."""
    healthy = FLOWS[name]()
    x = torch.rand(3, D, generator=generator()) * 0.8 + 0.1
    for number in range(len(list(healthy.parameters()))):
        for value in (1e-40, 1e30, -3e38, math.nan, -math.inf):
            flow = copy.deepcopy(healthy)
            parameter = [*flow.parameters()][number]
            parameter.view(-1)[parameter.numel() // 2] = value
            without_nan(lambda flow=flow: flow.log_prob(x))
            without_nan(lambda flow=flow: flow.sample(4, seed=0))
            without_nan(lambda flow=flow: flow.sample_and_log_prob(4, seed=0))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_log_scales_at_their_bound_in_every_block(backend: str, soft: bool, sign: int) -> None:
    """Densities, samples and gradients are those of float64, and the gradient of a clamped log-scale is zero."""
    flow = fastmaf.MAF(D, 3, (16,), seed=0, log_scale_bound=2.0, soft_bound=soft)
    with torch.no_grad():
        for block in blocks_of(flow):
            block.made.layers[-1].bias.view(D, 2)[:, 1] = sign * 1e4
    x = torch.rand(5, D, generator=generator())
    exact = copy.deepcopy(flow).double()
    exact.to(torch.float64)
    log_prob, expected = flow.log_prob(x), exact.log_prob(x.double())
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-4)
    z, ladj = flow(x)
    assert_close("values", ladj, torch.full((5,), -sign * 2.0 * 3 * D))
    assert torch.isfinite(flow.sample(5, seed=0)).all()
    expected.sum().backward()
    log_prob.sum().backward()
    for (name, parameter), other in zip(flow.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None and torch.isfinite(parameter.grad).all(), name
        scale = other.grad.abs().max().clamp_min(1e-6)
        assert (parameter.grad.double() - other.grad).abs().max() <= 1e-3 * scale, name
    for block in blocks_of(flow):
        bias: Any = block.made.layers[-1].bias.grad
        assert bias.view(D, 2)[:, 1].abs().max() == 0
