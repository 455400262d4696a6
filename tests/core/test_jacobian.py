"""Strict triangularity and log-determinants, proven by the autograd Jacobian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmaf
from tests.core.helpers import blocks_of, build, jacobian, normal
from tests.tolerances import assert_close

DEGREES: list[Any] = [
    "spread",
    "random",
    "cyclic",
    [torch.tensor([3, 3, 0, 9, 5, 5, 1]), torch.tensor([3, 9, 3, 5, 0])],
]


def made_jacobian(made: fastmaf.MADE, x: Tensor) -> Tensor:
    """Returns d (shift, raw log-scale) / dx as ``[D, 2, D]``."""
    return jacobian(made, x)


def all_alive(made: fastmaf.MADE) -> None:
    """Makes every weight, bias and (for positive x) unit positive: no relu hides a path, no two paths cancel."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.abs_()


def reachable(made: fastmaf.MADE) -> Tensor:
    """Returns which input reaches which output ``[D, D]``: products of masks, strict at the output."""
    degrees = [torch.arange(1, made.features + 1), *(d.long() for d in made.degrees)]
    paths = torch.eye(made.features)
    for below, above in zip(degrees, degrees[1:], strict=False):
        paths = ((above[:, None] >= below[None, :]).float() @ paths > 0).float()
    output = degrees[0][:, None] > degrees[-1][None, :]
    return output.float() @ paths > 0


@pytest.mark.parametrize("degrees", DEGREES, ids=["spread", "random", "cyclic", "explicit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_output_sees_exactly_what_its_degrees_allow(degrees: Any, dtype: torch.dtype) -> None:
    made = blocks_of(build(9, blocks=1, degrees=degrees, dtype=dtype))[0].made
    all_alive(made)
    slopes = made_jacobian(made, normal(9, dtype=dtype).abs())
    expected = reachable(made)
    assert torch.equal(expected, expected.tril(-1))
    for which, name in enumerate(("shift", "log_scale")):
        assert torch.equal(slopes[:, which] != 0, expected), f"{name} depends on other inputs than its degrees allow"


def test_spread_degrees_condition_everything() -> None:
    made = blocks_of(build(9, blocks=1, degrees="spread", hidden_features=(8, 8)))[0].made
    assert torch.equal(reachable(made), torch.ones(9, 9).tril(-1).bool())


@pytest.mark.parametrize("order", ["natural", "random", "reversed"])
def test_a_block_is_strictly_triangular_in_its_order(order: str) -> None:
    features = 11
    places = {
        "natural": torch.arange(features),
        "random": torch.randperm(features, generator=torch.Generator().manual_seed(4)),
        "reversed": torch.arange(features).flip(0),
    }[order]
    flow = build(features, blocks=1, order=[places], degrees="random", hidden_features=(23, 19), scale=2.0)
    x = normal(features, seed=6)
    slopes = jacobian(lambda v: flow(v)[0], x)[places][:, places]
    assert torch.equal(slopes.triu(1), torch.zeros_like(slopes))
    assert (slopes.tril(-1) != 0).any()
    # The diagonal is exp(-log_scale) alone: a leak would add d shift/dx or d log_scale/dx to it.
    ladj = flow(x[None])[1][0]
    assert_close("values", slopes.diagonal().log().sum(), ladj)
    assert slopes[0, 0] != 1.0 and int((slopes[0] != 0).sum()) == 1


def test_alternate_and_natural_orders_are_what_they_say() -> None:
    last = 10
    for order, unconditioned in (("natural", [0, 0, 0]), ("alternate", [0, last, 0])):
        flow = build(11, blocks=3, order=order, hidden_features=(10, 10))
        naive, x = flow.to_naive(), normal(11)
        assert_close("values", flow(x[None])[0], naive(x[None])[0])
        for block, dim in zip(naive.blocks, unconditioned, strict=True):
            slopes = jacobian(lambda v, block=block: block(v)[0], x)
            alone = [d for d in range(11) if int((slopes[d] != 0).sum()) == 1]
            assert dim in alone and (10 - dim) not in alone


@given(
    features=st.integers(2, 12),
    hidden=st.lists(st.integers(1, 15), min_size=1, max_size=3),
    degrees=st.sampled_from(["spread", "random", "cyclic"]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=30)
def test_triangularity_of_random_shapes(features: int, hidden: list[int], degrees: str, seed: int) -> None:
    made = blocks_of(build(features, blocks=1, degrees=degrees, hidden_features=tuple(hidden), seed=seed))[0].made
    all_alive(made)
    seen = (made_jacobian(made, normal(features, seed=seed).abs()) != 0).any(dim=1)
    assert torch.equal(seen, reachable(made))


def test_a_leaky_mask_is_seen() -> None:
    """Negative control: with strict=False outputs depend on their own inputs and ladj is not the log-determinant."""
    flow = build(9, blocks=1, degrees="random", order="natural", hidden_features=(30, 30), strict=False, scale=2.0)
    made, x = blocks_of(flow)[0].made, normal(9).abs()
    slopes = jacobian(lambda v: flow(v)[0], x)
    log_determinant = torch.linalg.slogdet(slopes).logabsdet
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("slogdet", flow(x[None])[1][0], log_determinant)
    all_alive(made)
    leaks = (made_jacobian(made, x) != 0).any(dim=1).diagonal()
    assert leaks.any()
    assert not torch.equal((made_jacobian(made, x) != 0).any(dim=1), reachable(made))


@pytest.mark.parametrize("options", [
    {},
    {"degrees": "random", "order": "random", "blocks": 3},
    {"degrees": "cyclic", "order": "natural", "log_scale_bound": None},
    {"degrees": "random", "log_scale_bound": 0.4, "soft_bound": True},
    {"degrees": "random", "log_scale_bound": 0.2, "soft_bound": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("features", [1, 2, 13])
def test_ladj_is_the_log_determinant(features: int, options: dict[str, Any]) -> None:
    flow = build(features, hidden_features=(17, 12), scale=2.0, **options)
    for seed in range(3):
        x = normal(features, seed=seed)
        expected = torch.linalg.slogdet(jacobian(lambda v: flow(v)[0], x)).logabsdet
        assert_close("slogdet", flow(x[None])[1][0], expected)
        inverse = torch.linalg.slogdet(jacobian(lambda v: flow.inverse(v)[0], x)).logabsdet
        assert_close("slogdet", flow.inverse(x[None])[1][0], inverse, "ladj of the inverse")
