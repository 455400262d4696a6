"""Derivatives against finite differences, and torch.compile, through log_prob and through the inverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import fastmaf
from tests.core.helpers import blocks_of, build, generator, naive_gradients, normal, padding_of
from tests.tolerances import assert_close

OPTIONS: list[dict[str, Any]] = [
    {"degrees": "spread", "order": "alternate"},
    {"degrees": "random", "order": "random", "log_scale_bound": 0.4, "soft_bound": True},
    {
        "degrees": [torch.tensor([0, 4, 2, 2, 3]), torch.tensor([3, 1, 4, 2])],
        "order": "natural",
        "log_scale_bound": None,
    },
    {"degrees": "random", "order": "natural", "log_scale_bound": 0.2, "soft_bound": False},
]


def visible_parameters(flow: fastmaf.MAF) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], dict[str, Tensor]]]:
    """Returns the visible weights and biases, and a function that builds all parameters from them.

    Padding is left out: it is zero by contract, and a finite difference would break the contract.
    """
    names, values, places = [], [], []
    modules = dict(flow.named_modules())
    for name, parameter in flow.named_parameters():
        owner, _, field = name.rpartition(".")
        seen = ~padding_of(modules[owner]) if field == "weight" else torch.ones_like(parameter, dtype=torch.bool)
        names.append(name)
        places.append(seen.nonzero()[:, 0])
        values.append(parameter.detach()[seen].clone().requires_grad_())
    sizes = {name: parameter.numel() for name, parameter in flow.named_parameters()}

    def full(numbers: Sequence[Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.zeros(sizes[name], dtype=torch.float64).index_put((place,), number)
            for name, place, number in zip(names, places, numbers, strict=True)
        }

    return values, full


class Call(torch.nn.Module):
    """Lets functional_call call methods of a flow other than forward."""

    def __init__(self, flow: fastmaf.MAF) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, method: str, x: Tensor) -> Any:
        return getattr(self.flow, method)(x)


@pytest.mark.parametrize(
    "method",
    ["log_prob", "inverse", *(pytest.param(method, marks=pytest.mark.slow) for method in ("nll_per_dim", "forward"))],
)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o['order']}-{o.get('log_scale_bound', 5.0)}")
def test_gradcheck(method: str, options: dict[str, Any]) -> None:
    flow = build(4, hidden_features=(5, 4), scale=1.5, **options)
    values, full = visible_parameters(flow)
    call, x = Call(flow), normal(3, 4, seed=1).requires_grad_()

    def function(x: Tensor, *numbers: Tensor) -> Any:
        return functional_call(call, {f"flow.{k}": v for k, v in full(numbers).items()}, (method, x))

    assert torch.autograd.gradcheck(function, (x, *values), eps=1e-6, atol=1e-6, rtol=1e-5)


def test_gradients_of_samples_and_their_log_prob() -> None:
    """rsample_and_log_prob is inverse and base density of the same noise: its gradients are the naive model's."""
    flow = build(7, hidden_features=(9, 6), degrees="random", order="random")
    naive = flow.to_naive()
    noise = torch.randn(4, 7, generator=generator(3), dtype=torch.float64)
    x, log_prob = flow.rsample_and_log_prob(4, generator=generator(3))
    x_naive, _ = naive.inverse(noise)
    assert_close("inverse", x, x_naive)
    (x.square().sum() + log_prob.sum()).backward()
    (x_naive.square().sum() + naive.log_prob(x_naive).sum()).backward()
    for name, (actual, expected) in naive_gradients(flow, naive).items():
        assert_close("gradients", actual, expected, f"gradient of {name}")


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_some_gradients_unneeded(direction: str) -> None:
    """Frozen parameters, and data without requires_grad, get no gradient and leave the others unchanged."""
    x, actual = normal(3, 7), {}
    for frozen in ("nothing", "x", "weights", "biases", "hidden"):
        flow = build(7)
        data = x.clone().requires_grad_(frozen != "x")
        for name, parameter in flow.named_parameters():
            hit = {"weights": "weight", "biases": "bias", "hidden": "hidden"}.get(frozen)
            parameter.requires_grad_(hit is None or hit not in name)
        z, ladj = getattr(flow, direction)(data)
        (z.sin().sum() + ladj.sum()).backward()
        gradients = {"x": data.grad, **{name: p.grad for name, p in flow.named_parameters()}}
        actual[frozen] = gradients
        needed = {"x": data.requires_grad, **{name: p.requires_grad for name, p in flow.named_parameters()}}
        for name, gradient in gradients.items():
            assert (gradient is not None) == needed[name], f"{frozen} frozen: gradient of {name}"
            if gradient is not None:
                expected = actual["nothing"][name]
                assert expected is not None
                assert_close("gradients", gradient, expected, f"{frozen} frozen: gradient of {name}")


def test_only_one_output_used() -> None:
    flow, x = build(7), normal(3, 7)
    naive = flow.to_naive()
    for pick in (0, 1):
        for model in (flow, naive):
            model.zero_grad()
            model(x)[pick].sum().backward()
        for name, (actual, expected) in naive_gradients(flow, naive).items():
            assert_close("gradients", actual, expected, f"output {pick}: gradient of {name}")


def test_nothing_is_recorded_without_need() -> None:
    flow, x = build(7), normal(3, 7)
    with torch.no_grad():
        assert flow(x)[0].grad_fn is None and flow.inverse(x)[0].grad_fn is None
    flow.requires_grad_(False)
    assert not flow.log_prob(x).requires_grad and not flow.sample(2).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("method", ["log_prob", "forward", "inverse", "nll_per_dim"])
def test_compile_fullgraph(method: str) -> None:
    torch.compiler.reset()
    flow = build(7, hidden_features=(9, 6), order="random")
    x = normal(3, 7)
    compiled = torch.compile(getattr(flow, method), fullgraph=True, backend="aot_eager")
    results, gradients = [], []
    for function in (getattr(flow, method), compiled):
        data = x.clone().requires_grad_()
        flow.zero_grad()
        result = function(data)
        result = result if isinstance(result, tuple) else (result,)
        sum(r.sin().sum() for r in result).backward()
        results.append(result)
        gradients.append([data.grad, *(p.grad.clone() for p in flow.parameters() if p.grad is not None)])
    for eager, other in zip(results[0] + tuple(gradients[0]), results[1] + tuple(gradients[1]), strict=True):
        assert_close("values", other, eager)
    assert len(gradients[0]) == 1 + len(list(flow.parameters()))
    with torch.no_grad():
        for batch in (1, 5):
            actual, expected = compiled(normal(batch, 7)), getattr(flow, method)(normal(batch, 7))
            for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (actual, expected)), strict=True):
                assert_close("values", a, b, f"compiled, batch {batch}")
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_training_keeps_the_padding() -> None:
    torch.compiler.reset()
    flow = build(29, hidden_features=(23, 17), degrees="random", dtype=torch.float32)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-2)
    loss_of = torch.compile(lambda x: -flow.log_prob(x).mean(), fullgraph=True, backend="aot_eager")
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(normal(8, 29, seed=seed, dtype=torch.float32)).backward()
        optimizer.step()
    for block in blocks_of(flow):
        for layer in block.made.layers:
            where = padding_of(layer)
            assert torch.equal(layer.weight[where], torch.zeros(int(where.sum())))
    torch.compiler.reset()
