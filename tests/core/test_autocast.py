"""Ambient autocast changes nothing: neither values nor gradients, wherever forward and backward pass are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from tests.core.helpers import build, generator, normal
from tests.tolerances import F32, assert_close
from tests.transforms.local_blocks import block as local_block

pytestmark = pytest.mark.usefixtures("one_thread")
D = 24
HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])


def autocast(half: torch.dtype = torch.bfloat16) -> Any:
    return torch.autocast("cpu", dtype=half)


def affine() -> fastmaf.Flow:
    flow = build(D, dtype=F32, order="random", whitening=4)
    flow.transforms[0].fit_(10 * normal(60, D, dtype=F32) @ normal(D, D, seed=1, dtype=F32) + 50)  # type: ignore[union-attr, operator]
    return flow


def local() -> fastmaf.Flow:
    whitening = fastmaf.GaussianWhitening(D, 3).fit_(normal(60, D, dtype=F32))
    steps = [fastmaf.Logit(D), local_block((1, 4, 6), dtype=F32), whitening, local_block((1, 4, 6), dtype=F32, seed=3)]
    return fastmaf.Flow(D, steps)


def single() -> fastmaf.Flow:
    """Returns a flow whose two blocks run as separate ops, since their activations differ."""
    flows = [build(D, dtype=F32, blocks=1, seed=seed) for seed in (0, 1)]
    first, last = (flow.transforms[0] for flow in flows)
    for layer in last.made.hidden:  # type: ignore[union-attr]
        layer.activation = "identity"
    last.made.activation = "identity"  # type: ignore[union-attr]
    return fastmaf.Flow(D, [first, last])


def data(n: int = 5) -> Tensor:
    return torch.rand(n, D, generator=generator(), dtype=F32)


FLOWS: dict[str, Callable[[], fastmaf.Flow]] = {"affine": affine, "local": local, "single": single}
METHODS: dict[str, Callable[[fastmaf.Flow, Tensor], tuple[Tensor, ...]]] = {
    "log_prob": lambda flow, x: (flow.log_prob(x),),
    "nll_per_dim": lambda flow, x: (flow.nll_per_dim(x),),
    "forward": lambda flow, x: flow(x),
    "inverse": lambda flow, x: flow.inverse(x),
    "modules": lambda flow, x: tuple(t for one in flow._transforms() for t in (*one(x), *one.inverse(x))),
}


@pytest.fixture(params=list(FLOWS))
def flow(request: pytest.FixtureRequest, backend: str) -> Iterator[fastmaf.Flow]:
    yield FLOWS[request.param]()


def derivatives(flow: fastmaf.Flow, method: str, before: Any, after: Any) -> list[Tensor]:
    """Returns values and all gradients, of a forward pass within one context and a backward pass within another."""
    flow.zero_grad()
    x = data().requires_grad_()
    with before:
        results = METHODS[method](flow, x)
        loss = sum(r.sin().sum() for r in results)
    assert isinstance(loss, Tensor)
    with after:
        loss.backward()
    assert x.grad is not None
    return [*(r.detach() for r in results), x.grad, *(p.grad for p in flow.parameters() if p.grad is not None)]


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("where", [(True, True), (True, False), (False, True)], ids=str)
def test_values_and_gradients(flow: fastmaf.Flow, method: str, where: tuple[bool, bool]) -> None:
    contexts = [autocast() if inside else torch.enable_grad() for inside in where]
    expected = derivatives(flow, method, torch.enable_grad(), torch.enable_grad())
    actual = derivatives(flow, method, *contexts)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == F32 and torch.equal(a, b)


@HALF
def test_float64_agrees_with_the_same_in_float32(half: torch.dtype) -> None:
    """With half-precision products the whitening would be off by 20 nats and local blocks by 1."""
    for make in FLOWS.values():
        flow, x = make(), data()
        with autocast(half):
            actual = flow.log_prob(x)
        expected = flow.sample_and_log_prob(4, generator=generator())
        with autocast(half):
            samples = flow.sample_and_log_prob(4, generator=generator())
        assert all(torch.equal(*pair) for pair in zip(samples, expected, strict=True))
        assert_close("values", actual.detach(), flow.double().log_prob(x.double()))


@pytest.mark.parametrize("transform", ["jvp", "grad", "hessian", "jacrev of jacrev", "vmap", "vjp outside"])
@pytest.mark.parametrize("name", ["affine", "local"])
def test_transforms_of_torch_func(name: str, transform: str) -> None:
    flow, x = FLOWS[name](), data(2)
    of = torch.func

    def scalar(x: Tensor) -> Tensor:
        return flow.log_prob(x).sin().sum()

    def differentiated(inner: Any) -> Tensor:
        if transform == "vjp outside":
            pull = of.vjp(scalar, x)[1]
            with inner:
                return pull(torch.ones(()))[0]
        with inner:
            calls: dict[str, Callable[[], Tensor]] = {
                "jvp": lambda: of.jvp(scalar, (x,), (torch.ones_like(x),))[1],
                "grad": lambda: of.grad(scalar)(x),
                "hessian": lambda: of.hessian(scalar)(x),
                "jacrev of jacrev": lambda: of.jacrev(of.jacrev(scalar))(x),
                "vmap": lambda: of.vmap(lambda row: scalar(row[None]))(x),
            }
            return calls[transform]()

    expected, actual = differentiated(torch.enable_grad()), differentiated(autocast())
    assert torch.equal(actual, expected)


def test_double_backward(backend: str) -> None:
    flow, actual = affine(), []
    for context in (torch.enable_grad(), autocast()):
        flow.zero_grad()
        x = data().requires_grad_()
        with context:
            slope = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)[0]
            slope.square().sum().backward()
        actual.append([x.grad, *(p.grad.clone() for p in flow.parameters() if p.grad is not None)])
    for a, b in zip(*actual, strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]


@HALF
def test_what_a_network_in_half_precision_made(half: torch.dtype) -> None:
    """Half-precision inputs are converted within an autocast region and refused elsewhere."""
    network, x = torch.nn.Linear(D, D), data()
    for make in FLOWS.values():
        for dtype in (F32, torch.float64):
            flow = make().to(dtype)
            with autocast(half):
                given = network(x).sigmoid()
                assert given.dtype == half
                actual = flow.log_prob(given)
                parts = [flow.nll_per_dim(given), *flow(given), *flow.inverse(given)]
                parts += next(t for t in flow._transforms() if list(t.parameters()))(given)
                actual.sum().backward()
            assert all(t.dtype == dtype for t in (actual, *parts))
            assert torch.equal(actual, flow.log_prob(given.to(dtype)))
            assert network.weight.grad is not None and bool(network.weight.grad.abs().sum() > 0)
            with pytest.raises(ValueError, match=f"x must be {dtype}.*found {half}"):
                flow.log_prob(given)
    made = build(D, dtype=F32).transforms[0].made
    with autocast(half):
        assert torch.equal(made(given), made(given.float()))  # type: ignore[operator]
        assert fastmaf.Permutation(torch.arange(D).flip(0))(given)[0].dtype == F32


def test_a_conditioner_may_ask_for_half_precision() -> None:
    class Shifted(fastmaf.Transform):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.network = D, torch.nn.Linear(1, D)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            dtypes.append(self.network(x[:, :1]).dtype)
            with autocast():
                dtypes.append(self.network(x[:, :1]).dtype)
            return x, x.new_zeros(len(x))

    dtypes: list[torch.dtype] = []
    with autocast():
        fastmaf.Flow(D, [Shifted()]).log_prob(data())
    assert dtypes == [F32, torch.bfloat16]


@pytest.mark.parametrize("guards", [fastmaf.Guards(), fastmaf.Guards(max_grad_norm=0.01)])
@pytest.mark.parametrize("optimiser", [fastmaf.optim.FusedAdam, torch.optim.Adam])
def test_training_steps(flow: fastmaf.Flow, optimiser: Any, guards: fastmaf.Guards) -> None:
    state, ends = {k: v.clone() for k, v in flow.state_dict().items()}, []
    for context in (torch.enable_grad(), autocast()):
        flow.load_state_dict(state)
        step = fastmaf.TrainingStep(flow, optimiser(flow.parameters(), lr=1e-2), guards)
        with context:
            losses = [step(data()).nll for _ in range(3)]
        ends.append([torch.tensor(losses), *(p.detach().clone() for p in flow.parameters())])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["affine", "local"])
def test_compiled(name: str) -> None:
    flow = FLOWS[name]()
    expected = derivatives(flow, "log_prob", torch.enable_grad(), torch.enable_grad())
    try:
        torch.compiler.reset()
        compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
        flow.zero_grad()
        x = data().requires_grad_()
        with autocast():
            result = compiled(x)
            result.sin().sum().backward()
    finally:
        torch.compiler.reset()
    actual = [result.detach(), x.grad, *(p.grad for p in flow.parameters() if p.grad is not None)]
    for a, b in zip(actual, expected, strict=True):
        assert_close("gradients", a, b)  # type: ignore[arg-type]
