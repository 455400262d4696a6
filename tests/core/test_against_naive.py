"""The packed model against the naive dense one, in float64: values, inverse and the gradient of every parameter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmaf
from tests.core.helpers import blocks_of, build, jacobian, layers_of, naive_gradients, normal
from tests.tolerances import assert_close

FEATURES = (1, 2, 3, 13, 37)
HIDDEN = ((4,), (13, 5), (40, 8, 21))
BOUNDS: tuple[dict[str, Any], ...] = (
    {"log_scale_bound": 5.0, "soft_bound": False},
    {"log_scale_bound": 0.3, "soft_bound": False},
    {"log_scale_bound": 0.5, "soft_bound": True},
    {"log_scale_bound": None},
)


def explicit_degrees(features: int, hidden: tuple[int, ...], seed: int) -> list[Tensor]:
    """Unsorted, with duplicates, units that see nothing (0) and units that see everything (D)."""
    result = []
    for k, width in enumerate(hidden):
        degrees = torch.randint(0, features + 1, (width,), generator=torch.Generator().manual_seed(seed + k))
        degrees[0], degrees[-1] = features, 0
        degrees[width // 2] = degrees[width // 3]
        result.append(degrees)
    return result


def degrees_of(kind: str, features: int, hidden: tuple[int, ...], blocks: int) -> Any:
    if kind == "explicit":
        return explicit_degrees(features, hidden, seed=features)
    if kind == "explicit per block":
        return [explicit_degrees(features, hidden, seed=features + 7 * i) for i in range(blocks)]
    return kind


def order_of(kind: str, features: int, blocks: int) -> Any:
    if kind == "explicit":
        return [torch.randperm(features, generator=torch.Generator().manual_seed(features + i)) for i in range(blocks)]
    return kind


def compare(flow: fastmaf.MAF, x: Tensor) -> None:
    """Checks z, ladj, log_prob, x of an inverse, and the gradients of a loss that reads all of z and ladj."""
    naive = flow.to_naive()
    x_fast, x_naive = x.clone().requires_grad_(), x.clone().requires_grad_()
    (z, ladj), (z_naive, ladj_naive) = flow(x_fast), naive(x_naive)
    assert z.shape == x.shape and ladj.shape == x.shape[:1]
    assert_close("values", z, z_naive, "z")
    assert_close("values", ladj, ladj_naive, "ladj")
    assert_close("values", flow.log_prob(x), naive.log_prob(x), "log_prob")

    weights = normal(*x.shape, seed=11)
    for z_of_one, ladj_of_one in ((z, ladj), (z_naive, ladj_naive)):
        ((z_of_one * weights).sum() + (ladj_of_one * (1.0 + weights[:, 0])).sum()).backward()
    assert x_fast.grad is not None and x_naive.grad is not None
    assert_close("gradients", x_fast.grad, x_naive.grad, "gradient of x")
    for name, (actual, expected) in naive_gradients(flow, naive).items():
        assert_close("gradients", actual, expected, f"gradient of {name}")

    with torch.no_grad():
        base = normal(*x.shape, seed=12)
        (back, ladj_back), (back_naive, ladj_back_naive) = flow.inverse(base), naive.inverse(base)
    assert_close("inverse", back, back_naive, "x of the inverse")
    assert_close("inverse", ladj_back, ladj_back_naive, "ladj of the inverse")


@pytest.mark.parametrize("degrees", ["spread", "random", "cyclic", "explicit", "explicit per block"])
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_degree_kinds(features: int, hidden: tuple[int, ...], degrees: str) -> None:
    flow = build(features, hidden_features=hidden, degrees=degrees_of(degrees, features, hidden, 2), scale=2.0)
    compare(flow, normal(3, features, seed=1))


@pytest.mark.parametrize("order", ["natural", "alternate", "random", "explicit"])
@pytest.mark.parametrize("features", FEATURES)
def test_order_kinds(features: int, order: str) -> None:
    flow = build(
        features, blocks=3, hidden_features=(9, 14), degrees="random", order=order_of(order, features, 3), scale=2.0
    )
    compare(flow, normal(5, features, seed=2))


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_bounds_and_batches(bound: dict[str, Any], batch: int) -> None:
    # Log-scales well past each bound; free ones grow from block to block, so they start smaller.
    flow = build(13, hidden_features=(17, 11), order="random", scale=3.0 if bound["log_scale_bound"] else 1.5, **bound)
    compare(flow, 2.0 * normal(batch, 13, seed=3))


@pytest.mark.parametrize("features, hidden", [(13, (13, 13)), (37, (37,)), (3, (64, 64)), (64, (2, 2))])
def test_hidden_beside_features(features: int, hidden: tuple[int, ...]) -> None:
    compare(build(features, hidden_features=hidden), normal(4, features, seed=4))


def test_runs_of_several_panels_as_at_full_size() -> None:
    """A layer large enough for neighbouring panels to share a width."""
    flow = build(1101, blocks=1, hidden_features=(200, 150), degrees="random", widths="own")
    (output,) = (layer for name, layer in layers_of(flow).items() if "output" in name)
    assert 1 < len(output.layout.runs) < len(output.layout.panels) - 1
    naive, x = flow.to_naive(), normal(5, 1101)
    flow.log_prob(x).sum().backward()
    naive.log_prob(x).sum().backward()
    assert_close("values", flow.log_prob(x), naive.log_prob(x))
    for name, (actual, expected) in naive_gradients(flow, naive).items():
        assert_close("gradients", actual, expected, f"gradient of {name}")
    with torch.no_grad():
        assert_close("round_trip", flow(flow.inverse(x)[0])[0], x)


@given(
    features=st.integers(1, 24),
    hidden=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    blocks=st.integers(1, 3),
    degrees=st.sampled_from(["spread", "random", "cyclic", "explicit", "explicit per block"]),
    order=st.sampled_from(["natural", "alternate", "random", "explicit"]),
    bound=st.sampled_from(BOUNDS),
    levels=st.none() | st.integers(1, 6),
    batch=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_random_models(
    features: int,
    hidden: list[int],
    blocks: int,
    degrees: str,
    order: str,
    bound: dict[str, Any],
    levels: int | None,
    batch: int,
    seed: int,
) -> None:
    widths = tuple(hidden)
    flow = build(
        features,
        blocks=blocks,
        hidden_features=widths,
        degrees=degrees_of(degrees, features, widths, blocks),
        order=order_of(order, features, blocks),
        levels=levels if "explicit" not in degrees else None,
        seed=seed,
        **bound,
    )
    compare(flow, normal(batch, features, seed=seed))


@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_the_naive_model_against_the_formula(bound: dict[str, Any]) -> None:
    """The naive model against the formula, evaluated unit by unit for one sample."""
    flow = build(5, blocks=1, hidden_features=(6, 4), degrees="random", order="natural", scale=2.0, **bound)
    made = blocks_of(flow)[0].made
    x = normal(1, 5, seed=5)[0]
    degrees = [torch.arange(1, 6), *made.degrees]
    h = x
    for layer, below, above in zip(made.layers[:-1], degrees, degrees[1:], strict=False):
        weight = layer.dense_weight()
        rows = []
        for j in range(above.numel()):
            seen = [i for i in range(below.numel()) if below[i] <= above[j]]
            rows.append(torch.relu(layer.bias[j] + sum(weight[j, i] * h[i] for i in seen)))
        h = torch.stack(rows)
    expected = torch.tensor(0.0, dtype=torch.float64)
    weight, bias = made.layers[-1].dense_weight(), made.layers[-1].bias
    limit, soft = bound["log_scale_bound"], bound.get("soft_bound")
    for d in range(5):
        seen = [i for i in range(4) if degrees[-1][i] < d + 1]
        shift, log_scale = (bias[r] + sum(weight[r, i] * h[i] for i in seen) for r in (2 * d, 2 * d + 1))
        if limit is not None:
            log_scale = limit * torch.tanh(log_scale / limit) if soft else log_scale.clamp(-limit, limit)
        z = (x[d] - shift) * torch.exp(-log_scale)
        expected = expected - 0.5 * z**2 - 0.5 * math.log(2 * math.pi) - log_scale
    assert_close("values", flow.to_naive().log_prob(x[None])[0], expected, "naive")
    assert_close("values", flow.log_prob(x[None])[0], expected, "packed")


def test_naive_gradients_see_a_wrong_one() -> None:
    """Negative control: the comparison fails for the gradients of another model."""
    flow, other, x = build(13), build(13, seed=1), normal(3, 13)
    naive = other.to_naive()
    flow.log_prob(x).sum().backward()
    naive.log_prob(x).sum().backward()
    with pytest.raises(AssertionError, match="relative error"):
        for actual, expected in naive_gradients(flow, naive).values():
            assert_close("gradients", actual, expected)


def test_jacobian_of_both() -> None:
    flow, x = build(7, order="random"), normal(7)
    naive = flow.to_naive()
    assert_close("gradients", jacobian(lambda v: flow(v)[0], x), jacobian(lambda v: naive(v)[0], x))
