"""Values that are not finite: errors for arguments and results, or confinement to their row."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

import fastmaf
from tests.core.helpers import blocks_of, build, generator, normal
from tests.tolerances import F32, assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ("forward", "inverse", "log_prob", "nll_per_dim")
BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("method", METHODS)
def test_arguments_that_are_not_finite_are_named(method: str, backend: str) -> None:
    flow, x = build(7), normal(6, 7)
    x[2, 3], x[4, 0], x[4, 1] = math.nan, math.inf, math.nan
    name = "z" if method == "inverse" else "x"
    for wanted in (None, True):
        flow.validate_args = wanted
        message = (
            f"{name} must be finite; found 2 NaN and 1 infinite values in 2 of 6 rows, the first in row 2, column 3"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            getattr(flow, method)(x)


def test_the_argument_of_the_constructor() -> None:
    x = torch.full((2, 7), math.nan, dtype=torch.float64)
    for flow in (build(7, validate_args=False), fastmaf.Flow(7, build(7).transforms, validate_args=False)):  # type: ignore[arg-type]
        assert flow.validate_args is False and flow.log_prob(x).isnan().all()
        flow.validate_args = True
        with pytest.raises(ValueError, match="14 NaN"):
            flow.log_prob(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [2, 5, 9, 70])
def test_without_validation_rows_do_not_mix(method: str, batch: int, backend: str) -> None:
    flow = build(23, hidden_features=(40, 19), order="random", whitening=3, validate_args=False)
    for dtype in (torch.float64, F32):
        flow.to(dtype)
        x = normal(batch, 23, dtype=dtype)
        clean = getattr(flow, method)(x)
        for value in BAD:
            bad = x.clone()
            bad[1, 4] = value
            actual = getattr(flow, method)(bad)
            for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (actual, clean)), strict=True):
                good = [i for i in range(batch) if i != 1]
                assert_close("values", one[good], other[good])
                if math.isnan(value):
                    assert one[1].isnan().any()
            last = actual if method in ("log_prob", "nll_per_dim") else actual[0]
            assert not last[1].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_large_finite_numbers_are_taken(method: str) -> None:
    """Finite values whose sum overflows are accepted."""
    flow = fastmaf.Flow(2, [fastmaf.GaussianWhitening(2, 0)])
    x = torch.full((3, 2), 3e38)
    result = getattr(flow, method)(x)
    assert not (result[0] if isinstance(result, tuple) else result).isnan().any()
    getattr(flow, method)(torch.zeros(0, 2))


def stretched(blocks: int, bound: float = 5.0) -> fastmaf.MAF:
    """Returns a flow with all log-scales at their bound."""
    flow = fastmaf.MAF(12, blocks, (32, 32), seed=0, log_scale_bound=bound, soft_bound=False)
    with torch.no_grad():
        for block in blocks_of(flow):
            block.made.output.bias[1::2] = 2 * bound
    return flow


@pytest.mark.parametrize("draw", ["sample", "rsample", "sample_and_log_prob", "rsample_and_log_prob"])
def test_samples_that_overflow_name_the_block(draw: str, backend: str) -> None:
    flow = stretched(20)
    pattern = (
        r"\d of 4 samples are not finite, the first of them row \d: numbers overflow torch\.float32 in "
        r"transforms\[\d+\] \(AffineAutoregressive, log_scale_bound=5\.0\).* 100 nats"
    )
    for options in ({"generator": generator()}, {"seed": 0}):
        with pytest.raises(FloatingPointError, match=pattern):
            getattr(flow, draw)(4, **options)
    flow.validate_args = False
    result = getattr(flow, draw)(4, seed=0)
    assert not (result[0] if isinstance(result, tuple) else result).isfinite().all()
    stretched(3).sample(4)


@pytest.mark.parametrize("method", ["log_prob", "nll_per_dim"])
def test_densities_that_are_nan_name_the_cause(method: str, backend: str) -> None:
    flow, x = stretched(20), torch.full((3, 12), 1e36)
    x[0] = 0
    flow.validate_args = False
    bad = getattr(flow, method)(x).reshape(3, -1).isnan().any(dim=1)
    assert bad.tolist() == [False, True, True]
    flow.validate_args = True
    with pytest.raises(FloatingPointError, match=rf"{method} is NaN in 2 of 3 rows.* row 1,.*transforms\[\d+\]"):
        getattr(flow, method)(x)
    flow = build(12)
    with torch.no_grad():
        blocks_of(flow)[1].made.output.bias[3] = math.nan
    with pytest.raises(FloatingPointError, match=r"transforms\.\d\.made\.output\.bias holds values that are not"):
        getattr(flow, method)(normal(2, 12))


def test_a_density_of_zero_is_no_error() -> None:
    flow = fastmaf.Flow(2, [fastmaf.Logit(2), fastmaf.GaussianWhitening(2, 0)])
    assert flow.log_prob(torch.tensor([[0.5, 3.0], [0.5, 0.5]]))[0] == -math.inf


def test_training_steps_report_their_own_error(backend: str) -> None:
    flow = build(7)
    step = fastmaf.TrainingStep(flow, torch.optim.Adam(flow.parameters()))
    with pytest.raises(fastmaf.NonFiniteLossError, match="NLL of a batch became nan at step 1"):
        step(torch.full((2, 7), math.nan, dtype=torch.float64))
    assert flow.validate_args is None
    step(normal(2, 7))


@pytest.mark.parametrize("how", ["compile", "trace", "vmap", "grad"])
def test_nothing_is_looked_at_while_it_is_recorded(how: str) -> None:
    flow = fastmaf.Flow(3, [fastmaf.GaussianWhitening(3, 1)], validate_args=True)
    x = torch.randn(4, 3, generator=generator())
    expected = flow.log_prob(x)
    actual: Any
    if how == "compile":
        actual = torch.compile(flow.log_prob, backend="aot_eager", fullgraph=True)(x)
    elif how == "trace":
        actual = torch.jit.trace(lambda v: flow.log_prob(v), x, check_trace=False)(x)
    elif how == "vmap":
        actual = torch.func.vmap(lambda row: flow.log_prob(row[None])[0])(x)
    else:
        actual = torch.func.grad_and_value(lambda v: flow.log_prob(v).sum())(x)[1]
        expected = expected.sum()
    assert_close("values", actual, expected)


def test_what_does_not_stay_finite_within_other_transforms_is_named() -> None:
    """Bounds of inverted blocks count, blocks without one have none, and a spline without tails ends."""
    for bound, words in (
        (3.0, r"log_scale_bound=3\.0\); .* as much as 6 nats"),
        (None, "over the transforms, without a"),
    ):
        flow = fastmaf.IAF(2, 2, 8, log_scale_bound=bound, soft_bound=False, dtype=torch.float64, seed=0)
        with torch.no_grad():
            for block in flow._mades():
                block.output.bias.fill_(3.0)
        with pytest.raises(FloatingPointError, match=words):
            flow.log_prob(torch.full((1, 2), 1e308, dtype=torch.float64))
    spline = fastmaf.SplineMap(bins=2, low=-2.0, high=2.0, tails=False)
    block = fastmaf.MonotonicRQS(fastmaf.MADE(2, 8, outputs_per_feature=spline.outputs), spline)
    for transform, name in ((block, "MonotonicRQS"), (fastmaf.Inverted(block), "Inverted")):
        with pytest.raises(FloatingPointError, match=rf"\({name}\) is not defined outside of -2 to 2, as its spline"):
            fastmaf.Flow(2, [transform]).log_prob(torch.tensor([[0.0, 2.5]]))
