"""Derivatives of every kind: forward mode, ``torch.func``, double backward, batched gradients; against the dense model
and against reverse mode, which gradcheck holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional

import fastmaf
from tests.core.helpers import build, naive_gradients, normal, padding_of
from tests.tolerances import F32, F64, assert_close
from tests.transforms.local_blocks import block as local_block

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:Attempted to insert a get_attr Node"),
]
Function = Callable[[Tensor], Tensor]
D = 8


def maf(**options: Any) -> fastmaf.MAF:
    return build(D, order="random", degrees="random", **options)


def others() -> fastmaf.Flow:
    """Returns a flow of everything but affine blocks, for data in (0, 1)."""
    whitening = fastmaf.GaussianWhitening(D, 3, dtype=F64).fit_(normal(30, D))
    local = local_block((2, 2, 2), patch=2)
    return fastmaf.Flow(D, [fastmaf.Logit(D), whitening, fastmaf.Permutation(torch.arange(D).flip(0)), local])


def data(n: int = 3, seed: int = 5) -> Tensor:
    return torch.rand(n, D, generator=torch.Generator().manual_seed(seed), dtype=F64)


METHODS: dict[str, Callable[[Any], Function]] = {
    "log_prob": lambda flow: flow.log_prob,
    "nll_per_dim": lambda flow: flow.nll_per_dim,
    "z": lambda flow: lambda x: flow(x)[0],
    "ladj": lambda flow: lambda x: flow(x)[1],
    "x": lambda flow: lambda z: flow.inverse(z)[0],
    "ladj of the inverse": lambda flow: lambda z: flow.inverse(z)[1],
}
METHOD = pytest.mark.parametrize("method", list(METHODS))
FAST = ("log_prob", "x")
SOME_SLOW = pytest.mark.parametrize(
    "method", [method if method in FAST else pytest.param(method, marks=pytest.mark.slow) for method in METHODS]
)
FLOW = pytest.mark.parametrize(
    "make", [pytest.param(maf, id="affine"), pytest.param(others, id="others", marks=pytest.mark.slow)]
)


def tangent(function: Function, x: Tensor, v: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        actual: Tensor | None = forward_ad.unpack_dual(function(forward_ad.make_dual(x, v))).tangent
        return actual


@FLOW
@SOME_SLOW
@pytest.mark.parametrize("frozen", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_forward_mode(make: Callable[[], fastmaf.Flow], method: str, frozen: bool) -> None:
    """The tangent is the Jacobian's product, whether or not anything records gradients."""
    flow, x, v = make(), data(), normal(3, D, seed=1)
    function = METHODS[method](flow)
    expected = functional.jacobian(function, x).flatten(-2) @ v.flatten()
    assert expected.abs().min() > 0
    flow.requires_grad_(not frozen)
    assert_close("gradients", torch.func.jvp(function, (x,), (v,))[1], expected, "torch.func.jvp")
    with torch.set_grad_enabled(not frozen):
        actual = tangent(function, x, v)
    assert actual is not None
    assert_close("gradients", actual, expected, "forward_ad")
    assert_close("gradients", functional.jvp(function, x, v)[1], expected, "torch.autograd.functional.jvp")
    assert_close("gradients", torch.func.linearize(function, x)[1](v), expected, "torch.func.linearize")


@FLOW
@SOME_SLOW
def test_jacobians_and_vmap(make: Callable[[], fastmaf.Flow], method: str) -> None:
    flow, x = make(), data()
    function = METHODS[method](flow)
    expected = functional.jacobian(function, x)
    assert_close("gradients", torch.func.jacrev(function)(x), expected, "jacrev")
    assert_close("gradients", torch.func.jacfwd(function)(x), expected, "jacfwd")
    for strategy in ("reverse-mode", "forward-mode"):
        actual = functional.jacobian(function, x, vectorize=True, strategy=strategy)
        assert_close("gradients", actual, expected, strategy)
    assert_close("values", torch.func.vmap(lambda row: function(row[None])[0])(x), function(x).detach(), "vmap")
    rows = torch.func.vmap(torch.func.grad(lambda row: function(row[None]).sum()))(x)
    whole = torch.autograd.grad(function(given := x.clone().requires_grad_()).sum(), given)[0]
    assert_close("gradients", rows, whole, "vmap of grad")


@FLOW
@SOME_SLOW
def test_second_derivatives(make: Callable[[], fastmaf.Flow], method: str) -> None:
    """Second derivatives agree with central differences of the first."""
    flow, x, v = make(), data(2), normal(2, D, seed=1)

    def scalar(x: Tensor) -> Tensor:
        return METHODS[method](flow)(x).sin().sum()

    def gradient(x: Tensor) -> Tensor:
        given = x.detach().requires_grad_()
        return torch.autograd.grad(scalar(given), given)[0]

    step = 1e-5
    expected = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
    hessian = torch.func.hessian(scalar)(x)
    product = (hessian.flatten(-2) @ v.flatten()).view_as(x)
    torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    actual = {
        "functional.hessian": functional.hessian(scalar, x),
        "jacrev of jacrev": torch.func.jacrev(torch.func.jacrev(scalar))(x),
        "jacrev of jacfwd": torch.func.jacrev(torch.func.jacfwd(scalar))(x),
        "jacfwd of jacfwd": torch.func.jacfwd(torch.func.jacfwd(scalar))(x),
    }
    for name, value in actual.items():
        assert_close("gradients", value, hessian, name)
    assert_close("gradients", functional.hvp(scalar, x, v)[1], product, "functional.hvp")


@pytest.mark.parametrize("method", ["log_prob", "x"])
@pytest.mark.parametrize("by", ["blocks in one call", "layer by layer"])
def test_gradient_penalty_is_that_of_the_dense_model(backend: str, method: str, by: str) -> None:
    """Double backward reaches every weight, through x and through the weights themselves; the padding stays at 0."""
    flow = maf(soft_bound=True)
    naive = flow.to_naive()

    def layers(x: Tensor) -> Tensor:
        if method == "x":
            for transform in reversed(flow._transforms()):
                x = transform.inverse(x)[0]
            return x
        terms = torch.zeros_like(x)
        for transform in flow._transforms():
            x, terms = transform.forward_per_dim(x, terms)
        return flow._base_log_prob(x) - terms.sum(dim=1)

    whole = METHODS[method](flow) if by == "blocks in one call" else layers
    for function in (whole, METHODS[method](naive)):
        x = data().requires_grad_()
        slope = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)[0]
        (slope.square().sum() + function(x).sum()).backward()
    for name, (actual, expected) in naive_gradients(flow, naive).items():
        assert_close("gradients", actual, expected, name)
    for layer in (m for m in flow.modules() if isinstance(m, fastmaf.MaskedLinear)):
        assert layer.weight.grad is not None
        assert layer.weight.grad[padding_of(layer)].count_nonzero() == 0


def test_no_derivative_is_counted_twice() -> None:
    """A block that is used twice gets the sum of the gradients of both uses."""
    one = build(D, blocks=1).transforms[0]
    twin, reverse = copy.deepcopy(one), fastmaf.Permutation(torch.arange(D).flip(0))

    def gradients(*blocks: Any) -> list[tuple[Tensor, ...]]:
        x = data().requires_grad_()
        first, last = blocks
        flow = fastmaf.Flow(D, [first, reverse, last])
        slope = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)[0]
        penalty = slope.square().sum()
        return [torch.autograd.grad(penalty, list(block.parameters()), retain_graph=True) for block in blocks]

    for actual, *apart in zip(gradients(one, one)[0], *gradients(one, twin), strict=True):
        assert_close("gradients", actual, apart[0] + apart[1])


@pytest.mark.parametrize("name", ["MaskedLinear", "MADE", "AffineAutoregressive"])
def test_single_modules(name: str) -> None:
    block = next(t for t in maf(blocks=1).transforms if isinstance(t, fastmaf.AffineAutoregressive))
    module: Any = {"MaskedLinear": block.made.hidden[0], "MADE": block.made, "AffineAutoregressive": block}[name]
    function: Any = (lambda x: module(x)[0]) if name == "AffineAutoregressive" else module
    x, v = data(), normal(3, D, seed=1)
    expected = functional.jacobian(function, x)
    product = expected.flatten(-2) @ v.flatten()
    assert_close("gradients", torch.func.jacfwd(function)(x), expected)
    assert_close("gradients", torch.func.jacrev(function)(x), expected)
    assert_close("gradients", torch.func.jvp(function, (x,), (v,))[1], product)
    assert_close("values", torch.func.vmap(lambda row: function(row[None])[0])(x), function(x).detach())


def test_gradients_of_the_weights() -> None:
    """Per-sample gradients, and tangents of the weights, through ``functional_call``."""
    flow, x = maf(), data()
    weights = {name: p.detach() for name, p in flow.named_parameters()}

    def nll(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return -torch.func.functional_call(flow, weights, (row[None],))[1].sum()

    actual = torch.func.vmap(torch.func.grad(nll), in_dims=(None, 0))(weights, x)
    for i, row in enumerate(x):
        flow.zero_grad()
        (-flow(row[None])[1].sum()).backward()
        for name, parameter in flow.named_parameters():
            assert parameter.grad is not None
            assert_close("gradients", actual[name][i], parameter.grad, name)
    tangents = {name: torch.ones_like(w) for name, w in weights.items()}
    along = torch.func.jvp(lambda w: nll(w, x[-1]), (weights,), (tangents,))[1]
    expected = sum(p.grad.sum() for p in flow.parameters() if p.grad is not None)
    assert isinstance(expected, Tensor)
    assert_close("gradients", along, expected)


def test_an_ensemble_in_one_call() -> None:
    flows, x = [build(D, seed=seed, whitening=2) for seed in range(3)], data()
    for k, flow in enumerate(flows):
        flow.transforms[0].fit_(normal(20, D, seed=k))  # type: ignore[union-attr, operator]
    state = torch.func.stack_module_state(flows)  # type: ignore[arg-type]

    class LogProb(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flows[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.flow.log_prob(x)

    call = LogProb()
    named = [{f"flow.{name}": t for name, t in part.items()} for part in state]
    actual = torch.func.vmap(lambda *s: torch.func.functional_call(call, s, (x,)))(*named)
    assert_close("values", actual.detach(), torch.stack([flow.log_prob(x) for flow in flows]).detach())


@METHOD
def test_weights_stored_in_fewer_bits(method: str) -> None:
    flow = maf(dtype=F32).to_inference()
    x, v = data().float(), normal(3, D, seed=1, dtype=F32)
    function = METHODS[method](flow)
    expected = functional.jacobian(function, x).flatten(-2) @ v.flatten()
    assert_close("gradients", torch.func.jvp(function, (x,), (v,))[1], expected)


def test_an_empty_batch() -> None:
    flow, none = maf(), data(0)
    for method in METHODS.values():
        function = method(flow)
        assert torch.func.jvp(function, (none,), (none,))[1].shape == function(none).shape


def test_samples_have_tangents() -> None:
    """Of the weights: what reparametrised samples are for."""
    flow = maf()
    weights = {name: p.detach() for name, p in flow.named_parameters()}
    z = normal(4, D)

    class Inverse(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, z: Tensor) -> Tensor:
            return self.flow.inverse(z)[0]

    call = Inverse()

    def of(weights: dict[str, Tensor]) -> Tensor:
        given = {f"flow.{name}": w for name, w in weights.items()}
        actual: Tensor = torch.func.functional_call(call, given, (z,)).square().sum()
        return actual

    tangents = {name: normal(*w.shape, seed=3) for name, w in weights.items()}
    flow.inverse(z)[0].square().sum().backward()
    expected = sum((p.grad * tangents[name]).sum() for name, p in flow.named_parameters() if p.grad is not None)
    assert isinstance(expected, Tensor)
    assert_close("gradients", torch.func.jvp(of, (weights,), (tangents,))[1], expected)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", [fastmaf.MAF, fastmaf.IAF])
def test_second_derivatives_of_implicit_inverses(kind: type[fastmaf.MAF], called: bool) -> None:
    """Where modules must be called they would lack terms, and are refused. ``torch.func`` has them all."""
    flow = kind(3, 2, 8, activation="tanh", dtype=torch.float64, seed=0)
    if called:
        for module in flow.modules():
            if isinstance(module, fastmaf.MADE):
                module.register_forward_hook(lambda *_: None)
    method = flow.inverse if kind is fastmaf.MAF else flow.forward
    z = normal(2, 3).requires_grad_()
    hessian = torch.func.hessian(lambda z: method(z[None])[0].sum())(z[0].detach())
    # Also where the loss is linear, and its own gradient constant.
    for loss in (lambda x: x.sum(), lambda x: x.square().sum()):
        if called:
            with pytest.raises(RuntimeError, match=r"cannot be differentiated again .*torch\.func\.hessian"):
                torch.autograd.grad(loss(method(z)[0]), z, create_graph=True)
            continue
        rows = torch.func.hessian(lambda z, loss=loss: loss(method(z[None])[0]))(z[0].detach())
        (grad,) = torch.autograd.grad(loss(method(z)[0]), z, create_graph=True)
        found = torch.stack([torch.autograd.grad(one, z, retain_graph=True)[0][0] for one in grad[0]])
        assert torch.allclose(found, rows, atol=1e-12)
    step = 1e-5 * torch.eye(3, dtype=torch.float64)
    slopes = [
        torch.autograd.grad(method(at)[0].sum(), at)[0]
        for at in ((z[0] + sign * step).detach().requires_grad_() for sign in (1, -1))
    ]
    assert torch.allclose(hessian, (slopes[0] - slopes[1]) / 2e-5, atol=1e-8)
