"""Round trips, the D-pass inverse and float32 errors, on trained weights."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.naive import NaiveMAF
from tests.core.helpers import build, correlated, generator, layers_of, naive_gradients, normal, train
from tests.tolerances import FLOAT32_FACTOR, FLOAT32_FLOOR, TOLERANCES, assert_close, assert_float32, distance, error

FEATURES = 61
DRAWS = 6  # inputs per comparison of float32 errors; see assert_float32


@functools.cache
def trained(
    dtype: torch.dtype, degrees: str = "spread", order: str = "alternate"
) -> tuple[fastmaf.MAF, tuple[float, ...]]:
    flow = build(FEATURES, blocks=3, hidden_features=(48, 32), degrees=degrees, order=order, dtype=dtype)
    return flow, tuple(train(flow, correlated(2048, FEATURES, dtype=dtype)))


@pytest.mark.parametrize("order", ["natural", "random", pytest.param("alternate", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_round_trip_of_a_trained_model(
    dtype: torch.dtype, order: str, record_property: Callable[[str, object], None]
) -> None:
    flow, losses = trained(dtype, order=order)
    assert losses[-1] < losses[0] - 0.5, (
        f"training did not get anywhere: {losses[0]:.2f} to {losses[-1]:.2f} nats per dimension"
    )
    x = correlated(257, FEATURES, seed=1, dtype=dtype)
    with torch.no_grad():
        z, ladj = flow(x)
        back, ladj_back = flow.inverse(z)
        worst = float((back - x).abs().max() / x.abs().max())
        base = normal(257, FEATURES, seed=2, dtype=dtype)
        there = flow(flow.inverse(base)[0])[0]
    record_property("worst_round_trip_error", worst)
    print(f"round trip, {dtype}, order {order}: worst |inverse(forward(x)) - x| / max |x| = {worst:.2e}")
    assert worst <= TOLERANCES["round_trip"][dtype]
    assert_close("round_trip", there, base, "forward(inverse(z))")
    assert_close("round_trip", ladj_back, -ladj)


@pytest.mark.parametrize("degrees", ["random", pytest.param("spread", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_level_inverse_is_the_d_pass_inverse(dtype: torch.dtype, degrees: str) -> None:
    flow, _ = trained(dtype, degrees=degrees)
    z = normal(5, FEATURES, seed=3, dtype=dtype)
    with torch.no_grad():
        (x, ladj), (x_naive, ladj_naive) = flow.inverse(z), flow.to_naive().inverse(z)
    assert_close("inverse", x, x_naive)
    assert_close("inverse", ladj, ladj_naive)


class Run:
    """The values of a model for one input, and the gradients of a loss of z and ladj."""

    def __init__(self, model: fastmaf.MAF | NaiveMAF, x: Tensor, *, inverse: int | None) -> None:
        x = x.clone().requires_grad_()
        z, ladj = model(x)
        self.values = {"z": z, "ladj": ladj, "log_prob": model.log_prob(x.detach())}
        (z.square().sum() / 2 - ladj.sum()).backward()
        assert x.grad is not None
        self.values["gradient of x"] = x.grad
        if inverse is not None:  # the seed of the base
            with torch.no_grad():
                # From the base, as samples are: one outlying row would else be most of the norm, and its error is luck.
                base = normal(min(32, x.shape[0]), x.shape[1], seed=21 + inverse, dtype=torch.float32).to(x.dtype)
                self.values["x of the inverse"], self.values["ladj of the inverse"] = model.inverse(base)


def check_float32(draws: Sequence[tuple[fastmaf.MAF, Tensor]]) -> None:
    """Checks float32 against the float64 truth: it may err at most a factor more than the naive model in float32.

    Args:
        draws: models and inputs. Few parameters need several models too: at D = 1 the rounding of exp(-log_scale) is
            one and the same for every input.
    """
    errors: dict[str, list[tuple[float, float]]] = defaultdict(list)
    others: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for seed, (flow, x) in enumerate(draws):
        assert x.dtype == torch.float32
        packed, naive, exact = copy.deepcopy(flow), flow.to_naive(), copy.deepcopy(flow).double()
        exact_naive = exact.to_naive()
        actual, peer, truth = (
            Run(packed, x, inverse=seed),
            Run(naive, x, inverse=seed),
            Run(exact, x.double(), inverse=seed),
        )
        Run(exact_naive, x.double(), inverse=None)
        true_gradients = naive_gradients(exact, exact_naive)
        for name, (gradient, peer_gradient) in naive_gradients(packed, naive).items():
            key = f"gradient of {name}"
            actual.values[key], peer.values[key], truth.values[key] = gradient, peer_gradient, true_gradients[name][0]
        for name, value in actual.values.items():
            errors[name].append(distance(value, truth.values[name]))
            others[name].append(distance(peer.values[name], truth.values[name]))
    assert_float32(errors, others)


@pytest.mark.parametrize("order, degrees", [("alternate", "spread"), ("alternate", "random"), ("random", "spread")])
@pytest.mark.slow
def test_float32_on_trained_weights(backend: str, order: str, degrees: str) -> None:
    draws = [correlated(301, FEATURES, seed=5 + i, dtype=torch.float32) for i in range(DRAWS)]
    flow, _ = trained(torch.float32, degrees=degrees, order=order)
    check_float32([(flow, x) for x in draws])


@pytest.mark.parametrize(
    "features, hidden",
    [
        (1, (4,)),
        (2, (8, 8)),
        (13, (13, 13)),
        (37, (8,)),
        pytest.param(127, (64, 200), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options", [{}, {"soft_bound": False, "log_scale_bound": 5.0}, {"log_scale_bound": None}], ids=str
)
def test_float32_on_fresh_weights(
    backend: str, features: int, hidden: tuple[int, ...], options: dict[str, Any]
) -> None:
    draws = []
    for i in range(DRAWS):
        flow = build(features, hidden_features=hidden, degrees="random", dtype=torch.float32, seed=i, **options)
        draws.append((flow, normal(256, features, seed=1000 * i + features, dtype=torch.float32)))
    check_float32(draws)


@pytest.mark.slow
def test_float32_at_full_size() -> None:
    """One block of the reference size. Its truth is the packed model in float64, as tested above."""
    flow = build(12_288, blocks=1, hidden_features=(512, 512), degrees="random", dtype=torch.float32, widths="own")
    assert all(len(layer.layout.runs) > 1 for layer in layers_of(flow).values())
    x = torch.rand(3, 12_288, generator=generator(6))
    naive, exact = flow.to_naive(), copy.deepcopy(flow).double()
    actual, peer, truth = (
        Run(flow, x, inverse=None),
        Run(naive, x, inverse=None),
        Run(exact, x.double(), inverse=None),
    )
    for name in actual.values:
        errors, others = error(actual.values[name], truth.values[name]), error(peer.values[name], truth.values[name])
        assert errors <= max(FLOAT32_FACTOR * others, FLOAT32_FLOOR), (
            f"{name}: {errors:.2e} where the naive model errs by {others:.2e}"
        )
    for name, (gradient, peer_gradient) in naive_gradients(flow, naive).items():
        true_gradient = dict(naive_gradients(exact, naive))[name][0]
        errors, others = error(gradient, true_gradient), error(peer_gradient, true_gradient)
        assert errors <= max(FLOAT32_FACTOR * others, FLOAT32_FLOOR), (
            f"gradient of {name}: {errors:.2e}, the naive model {others:.2e}"
        )
    with torch.no_grad():
        z = torch.randn(2, 12_288, generator=generator(7))
        assert_close("round_trip", flow(flow.inverse(z)[0])[0], z)
        assert_close("inverse", flow.inverse(z)[0], exact.inverse(z.double())[0])


@pytest.mark.parametrize("features", [1, 12_288, 100_003])
def test_sums_over_dimensions_are_accurate(features: int) -> None:
    """Terms of one sign: added one by one in float32 they would lose 3 units in the last place at D = 12,288."""
    options: dict[str, Any] = {"init": "identity", "log_scale_bound": None, "dtype": torch.float32}
    flow = build(features, blocks=1, hidden_features=(1,), order="natural", **options)
    log_scale = 3.0 + torch.rand(features, generator=generator(8))
    with torch.no_grad():
        next(reversed(list(layers_of(flow).values()))).bias[1::2] = log_scale
    x = 40.0 * torch.rand(2, features, generator=generator(9))
    with torch.no_grad():
        z, ladj = flow(x)
        log_prob = flow.log_prob(x)
        _, ladj_inverse = flow.inverse(z)
    expected = -log_scale.double().sum().expand(2)
    assert error(ladj, expected) <= 2 * torch.finfo(torch.float32).eps
    assert error(ladj_inverse, -expected) <= 2 * torch.finfo(torch.float32).eps
    base = -0.5 * (z.double().square() + torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))).sum(dim=1)
    assert error(log_prob, base + expected) <= 2 * torch.finfo(torch.float32).eps
