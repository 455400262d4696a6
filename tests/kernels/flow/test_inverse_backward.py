"""Gradients through the inverse, by the transposed solve, against autograd through the steps of the inverse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.kernels import AffineMap, composite, flow_forward, flow_inverse
from fastmaf.kernels.affine_output.affine_map import SCALE_FIRST, SHIFT_FIRST, SIGMOID, SOFT_CLIP, TANH
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.flow.args import FlowArgs
from fastmaf.kernels.flow.torch import transposed_groups
from tests.core.helpers import build, correlated, generator, naive_gradients, normal, train
from tests.tolerances import assert_close, error

# Widths, features and degrees: groups of several steps, steps of their own, units that no output reads, none at all.
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "one dimension": (1, {"hidden_features": 5}),
    "two dimensions": (2, {"hidden_features": (3, 4)}),
    "one hidden layer": (13, {"hidden_features": 40}),
    "few units": (37, {"hidden_features": (5, 7), "degrees": "random"}),
    "as many": (41, {"hidden_features": (41, 41)}),
    "many units": (11, {"hidden_features": (70, 50), "degrees": "random"}),
    "three layers": (53, {"hidden_features": (48, 35, 50), "degrees": "random", "order": "random"}),
    "few levels": (40, {"hidden_features": (64, 64), "levels": 3}),
    "cyclic": (60, {"hidden_features": (33, 20), "degrees": "cyclic"}),
}
BOUNDS: dict[str, dict[str, Any]] = {
    "soft": {"log_scale_bound": 1.5},
    "clamp": {"log_scale_bound": 0.2, "soft_bound": False},
    "free": {"log_scale_bound": None},
}


def trained(name: str, **options: Any) -> fastmaf.MAF:
    features, shape = SHAPES[name]
    flow = build(features, **{**shape, "blocks": 2, **options})
    train(flow, correlated(128, features), steps=8, lr=1e-2)
    return flow


def args_of(flow: fastmaf.MAF) -> FlowArgs:
    """Returns the arguments of the flow's inverse."""
    run = flow._runs.single(flow._transforms())
    assert run is not None
    return run.inverse().args


def gradients(function: Any, z: Tensor, args: FlowArgs) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (z, *args.parameters)]
    x, ladj = function(leaves[0], args.with_parameters(leaves[1:]))
    factor = normal(*x.shape, seed=5, dtype=x.dtype)
    loss = (x * factor).sum() + (x.sin().sum(1) + ladj).square().sum()
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bound", BOUNDS)
def test_against_autograd(backend: str, name: str, bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = trained(name, **BOUNDS[bound])
    args = args_of(flow)
    for batch in (0, 1, 5):
        if batch == 5:  # in groups of 16 units, as layers of production sizes have them
            monkeypatch.setattr(transposed_groups, "_SMALL", 0)
        z = normal(batch, flow.features, seed=batch)
        found, expected = gradients(flow_inverse, z, args), gradients(composite.flow_inverse, z, args)
        for actual, truth in zip(found, expected, strict=True):
            assert actual.shape == truth.shape and error(actual, truth) < 1e-10, f"batch {batch}"


@pytest.mark.parametrize("name", ["few units", "many units", "three layers"])
def test_against_the_dense_model(name: str) -> None:
    """Autograd through the naive model's inverse, of one pass of the network per dimension."""
    flow = trained(name, blocks=3)
    naive, z = flow.to_naive(), normal(3, flow.features)
    leaves = [z.clone().requires_grad_() for _ in range(2)]
    for model, leaf in zip((flow, naive), leaves, strict=True):
        model.zero_grad()
        x, ladj = model.inverse(leaf)
        (x.sin().sum() + ladj.square().sum()).backward()
    assert error(leaves[0].grad, leaves[1].grad) < 1e-10
    for what, (actual, expected) in naive_gradients(flow, naive).items():
        assert error(actual, expected) < 1e-10, what


@pytest.mark.parametrize("form", [SHIFT_FIRST, SCALE_FIRST])
@pytest.mark.parametrize("scale", [TANH, SIGMOID, SOFT_CLIP])
def test_other_maps(backend: str, form: int, scale: int) -> None:
    flow = trained("three layers")
    affine_map = AffineMap(form, scale, 2.0, 1e-3)
    args = args_of(flow)._replace(maps=[float(number) for _ in range(2) for number in affine_map])
    z = normal(3, flow.features)
    for actual, truth in zip(gradients(flow_inverse, z, args), gradients(composite.flow_inverse, z, args), strict=True):
        assert error(actual, truth) < 1e-10


def test_it_is_the_backward_pass_of_the_forward_pass_at_x() -> None:
    """With the gradient w of z found, -w sent backwards through the forward pass gives -grad_x and minus all others."""
    flow = trained("three layers")
    inverse, z = args_of(flow), normal(4, 53)
    x, _ = flow_inverse(z, inverse)
    grad_x, grad_ladj = normal(4, 53, seed=1), normal(4, seed=2)
    solve = implementation("flow", x).inverse_backward
    w, *grads = solve(grad_x, grad_ladj, x.detach(), inverse, True)
    forward = inverse.inverted()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *forward.parameters)]
    results = flow_forward(leaves[0], forward.with_parameters(leaves[1:]))
    back = torch.autograd.grad(results, leaves, (-w, -grad_ladj))
    assert_close("gradients", back[0], -grad_x)
    # The order of the blocks is reversed, each of four layers.
    weights = [*grads[4:8], *grads[:4], *grads[12:], *grads[8:12]]
    for actual, expected in zip(back[1:], weights, strict=True):
        assert_close("gradients", actual, expected)


def test_float32_errs_as_the_forward_pass_does(backend: str) -> None:
    """The error of a float32 solve against float64 is at most twice that of autograd through the steps in float32."""
    found: list[float] = []
    steps: list[float] = []
    for seed in range(4):
        flow = trained("three layers", seed=seed)
        z = normal(8, flow.features, seed=seed)
        exact = gradients(composite.flow_inverse, z, args_of(flow))
        args = args_of(flow.float())
        for errors, function in ((found, flow_inverse), (steps, composite.flow_inverse)):
            results = gradients(function, z.float(), args)
            errors += [error(result, truth) for result, truth in zip(results, exact, strict=True)]
    assert math.hypot(*found) < 2 * math.hypot(*steps)


def test_frozen_parameters_cost_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = trained("few units").requires_grad_(False)
    z = normal(3, 37).requires_grad_()
    backend = implementation("masked_linear", z)
    monkeypatch.setattr(backend, "backward", lambda *_: pytest.fail("a gradient of parameters was computed"))
    x, ladj = flow.inverse(z)
    (grad,) = torch.autograd.grad(x.sum() + ladj.sum(), z)
    z, again = z.detach().requires_grad_(), composite.flow_inverse
    x, ladj = again(z, args_of(flow))
    assert error(grad, torch.autograd.grad(x.sum() + ladj.sum(), z)[0]) < 1e-10


def test_rows_are_independent() -> None:
    """A row whose gradient is NaN leaves those of the others alone."""
    flow, z = trained("many units"), normal(4, 11).requires_grad_()
    x, ladj = flow.inverse(z)
    weight = torch.ones_like(x)
    (expected,) = torch.autograd.grad((x, ladj), z, (weight, ladj), retain_graph=True)
    weight[2, 5] = math.nan
    (found,) = torch.autograd.grad((x, ladj), z, (weight, ladj))
    others = torch.tensor([0, 1, 3])
    assert bool(found[2].isnan().any())
    assert_close("gradients", found[others], expected[others])


@pytest.mark.parametrize("name", ["few units", "three layers"])
def test_second_derivatives_are_those_of_the_composite_op(name: str) -> None:
    flow = trained(name).requires_grad_(False)
    z = normal(2, flow.features).requires_grad_()
    results = []
    for function in (flow_inverse, composite.flow_inverse):
        x, ladj = function(z, args_of(flow))
        (grad,) = torch.autograd.grad(x.sin().sum() + ladj.square().sum(), z, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), z)[0])
    assert error(*results) < 1e-10


def test_blocks_that_are_inverted_train_through_it() -> None:
    """An inverse autoregressive flow: the density is the inverse, whose gradients fit it to data."""
    blocks = [
        fastmaf.Inverted(fastmaf.AffineAutoregressive(fastmaf.MADE(2, 16, generator=generator(i)))) for i in range(2)
    ]
    flow = fastmaf.Flow(2, [blocks[0], fastmaf.Permutation([1, 0]), blocks[1]])
    losses = train(flow, correlated(256, 2, dtype=torch.float32) * 3, steps=100, lr=1e-2)
    assert losses[-1] < losses[0] - 0.2
