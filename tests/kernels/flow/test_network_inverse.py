"""Gradients through the inverse of blocks of any network, by the transposed solve, against autograd through one call of
the network per level.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.flow.torch import transposed_groups
from fastmaf.transforms.autoregressive import Autoregressive
from tests.core.helpers import generator, normal
from tests.tolerances import error

SCALE_FIRST = fastmaf.AffineMap.of("scale_first", "softplus", epsilon=0.5)

# Features and options of the network.
NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {
    "one dimension": (1, {"hidden_features": (5, 4), "activation": "tanh", "context_features": 2}),
    "context": (23, {"hidden_features": (40, 30), "degrees": "random", "context_features": 3}),
    "context of ReLUs in one layer": (37, {"hidden_features": 20, "degrees": "random", "context_features": 1}),
    "residual": (23, {"hidden_features": (40, 30, 40), "degrees": "random", "residual": True}),
    "residual, five layers": (
        19,
        {
            "hidden_features": (35, 20, 35, 50, 35),
            "degrees": "random",
            "residual": True,
            "context_features": 2,
            "activation": "silu",
        },
    ),
    "residual, narrow inside": (30, {"hidden_features": (50, 2, 50, 1, 50), "degrees": "random", "residual": True}),
    "smooth": (31, {"hidden_features": (33, 17), "activation": ("elu", "gelu")}),
    "leaky": (40, {"hidden_features": (64, 64, 10), "activation": "leaky_relu", "levels": 3}),
    "cyclic": (60, {"hidden_features": (33, 20), "activation": "tanh", "degrees": "cyclic"}),
}


def affine(made: dict[str, Any]) -> Autoregressive:
    return fastmaf.AffineAutoregressive(fastmaf.MADE(**made), log_scale_bound=2.0, soft_bound=True)


def scale_first(made: dict[str, Any]) -> Autoregressive:
    return fastmaf.AffineAutoregressive(fastmaf.MADE(**made), affine_map=SCALE_FIRST)


def spline(made: dict[str, Any]) -> Autoregressive:
    of = fastmaf.SplineMap(bins=4, low=-2.0, high=2.0)  # some dimensions of z lie outside
    return fastmaf.MonotonicRQS(fastmaf.MADE(**made, outputs_per_feature=of.outputs), of)


BLOCKS: dict[str, Callable[[dict[str, Any]], Autoregressive]] = {
    "affine": affine,
    "scale first": scale_first,
    "spline": spline,
}


def block(kind: str, name: str, dtype: torch.dtype = torch.float64) -> Autoregressive:
    features, options = NETWORKS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastmaf.ConnectivityWarning)
        result = BLOCKS[kind]({"features": features, "generator": generator(3), "dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in result.parameters():
            parameter *= 1.3
    return result.to(dtype)


def arguments(of: Autoregressive, batch: int) -> list[Tensor]:
    """Returns z, and a context where there is one."""
    dtype, sizes = next(of.parameters()).dtype, [of.features, *([of.context_features] if of.context_features else [])]
    return [1.5 * normal(batch, size, seed=size).to(dtype) for size in sizes]


def gradients(of: Autoregressive, inverse: Any, given: list[Tensor]) -> list[Tensor]:
    """Returns those of z, the context and all parameters."""
    leaves = [one.detach().requires_grad_() for one in given]
    x, ladj = inverse(leaves[0], *(leaves[1:] or [None]))
    factor = normal(*x.shape, seed=5).to(x.dtype)
    loss = (x * factor).sum() + (x.sin().sum(1) + ladj).square().sum()
    return list(torch.autograd.grad(loss, [*leaves, *of.parameters()], materialize_grads=True))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_against_autograd(backend: str, kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = block(kind, name)
    for batch in (0, 1, 5):
        if batch == 5:  # in groups of 16 units, as layers of production sizes have them
            monkeypatch.setattr(transposed_groups, "_SMALL", 0)
        given = arguments(of, batch)
        found, expected = gradients(of, of.inverse, given), gradients(of, of._inverse_by_modules, given)
        for actual, truth in zip(found, expected, strict=True):
            assert actual.shape == truth.shape and error(actual, truth) < 1e-10, f"batch {batch}"


@pytest.mark.parametrize("name", ["context", "residual, five layers"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_second_derivatives(kind: str, name: str) -> None:
    of = block(kind, name)
    given, results = arguments(of, 2), []
    for inverse in (of.inverse, of._inverse_by_modules):
        leaves = [*(one.detach().requires_grad_() for one in given), *of.parameters()]
        x, ladj = inverse(*leaves[: len(given)] if len(given) > 1 else (leaves[0], None))
        grads = torch.autograd.grad(x.sin().sum() + ladj.square().sum(), leaves, create_graph=True)
        loss = sum((grad.square().sum() for grad in grads), torch.zeros(()))
        results.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    for actual, truth in zip(*results, strict=True):
        assert error(actual, truth) < 1e-9


def test_batched_gradients() -> None:
    of = block("affine", "residual")
    (z,) = arguments(of, 2)
    z = z.requires_grad_()
    x, _ = of.inverse(z)
    rows = torch.eye(z.shape[1], dtype=z.dtype)[:, None].expand(-1, 2, -1)
    (batched,) = torch.autograd.grad(x, z, rows, is_grads_batched=True, retain_graph=True)
    each = torch.stack([torch.autograd.grad(x, z, row, retain_graph=True)[0] for row in rows])
    assert error(batched, each) < 1e-12


def test_float32_errs_as_the_steps_do(backend: str) -> None:
    """The error of a float32 solve against float64 is at most twice that of autograd through the levels in float32."""
    found: list[float] = []
    steps: list[float] = []
    for name in NETWORKS:
        exact, of = block("affine", name), block("affine", name, torch.float32)
        given = arguments(exact, 8)
        truth = gradients(exact, exact.inverse, given)
        for errors, inverse in ((found, of.inverse), (steps, of._inverse_by_modules)):
            results = gradients(of, inverse, [one.float() for one in given])
            errors += [error(result, of_truth) for result, of_truth in zip(results, truth, strict=True)]
    assert math.hypot(*found) < 2 * math.hypot(*steps)


def test_frozen_parameters_cost_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    of = block("spline", "context").requires_grad_(False)
    z, context = (one.requires_grad_() for one in arguments(of, 3))
    expected = torch.autograd.grad(of._inverse_by_modules(z, context)[0].sum(), (z, context))
    backend = implementation("masked_linear", z)
    monkeypatch.setattr(backend, "backward", lambda *_: pytest.fail("a gradient of parameters was computed"))
    x, _ = of.inverse(z, context)
    for actual, truth in zip(torch.autograd.grad(x.sum(), (z, context)), expected, strict=True):
        assert error(actual, truth) < 1e-10


def test_rows_are_independent() -> None:
    """A row whose gradient is NaN leaves those of the others alone."""
    of = block("affine", "residual")
    (z,) = arguments(of, 4)
    x, ladj = of.inverse(z.requires_grad_())
    weight = torch.ones_like(x)
    (expected,) = torch.autograd.grad((x, ladj), z, (weight, ladj), retain_graph=True)
    weight[2, 5] = math.nan
    (found,) = torch.autograd.grad((x, ladj), z, (weight, ladj))
    others = torch.tensor([0, 1, 3])
    assert bool(found[2].isnan().any())
    torch.testing.assert_close(found[others], expected[others])


def test_nothing_is_kept_but_what_goes_in_and_comes_out() -> None:
    of, kept = block("affine", "residual"), set[tuple[int, ...]]()
    (z,) = arguments(of, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.add(tuple(one.shape)) or one, lambda one: one):
        of.inverse(z)
    assert kept == {tuple(z.shape), *(tuple(one.shape) for one in of.parameters())}
