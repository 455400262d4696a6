"""The padding of packed weights stays exactly zero, and uninitialised memory is never read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from tests.core.helpers import blocks_of, build, correlated, generator, layers_of, normal, padding_of

OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "Adam amsgrad foreach": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=0.1, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def model(**options: Any) -> fastmaf.MAF:
    flow = build(29, hidden_features=(23, 17), degrees="random", **{"dtype": torch.float32, **options})
    assert flow.stored_weights > flow.visible_weights, "this model has no padding to speak of"
    return flow


def paddings(flow: fastmaf.MAF) -> Iterator[tuple[str, fastmaf.MaskedLinear, Tensor]]:
    for name, layer in layers_of(flow).items():
        where = padding_of(layer)
        assert int(where.sum()) == layer.layout.numel - layer.layout.visible
        yield name, layer, where


def check_padding(flow: fastmaf.MAF, what: str) -> None:
    """Checks that the padding of weights and gradients is exactly zero, also independently of the library's check."""
    for name, layer, where in paddings(flow):
        assert torch.equal(layer.weight[where], torch.zeros(int(where.sum()), dtype=layer.weight.dtype)), (
            f"{what}: weight of {name}"
        )
        assert layer.layout.padding_is_zero(layer.weight)
        if layer.weight.grad is not None:
            assert torch.equal(layer.weight.grad[where], torch.zeros_like(layer.weight.grad[where])), (
                f"{what}: gradient of {name}"
            )
            assert (layer.weight.grad[~where] != 0).any(), f"{what}: gradient of {name} is zero everywhere"


@pytest.mark.parametrize("init", ["linear", "identity"])
def test_padding_is_zero_at_the_start(init: str) -> None:
    flow = model(init=init)
    check_padding(flow, "fresh")
    for layer in layers_of(flow).values():
        layer.reset_parameters()
    check_padding(flow, "reset_parameters")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_padding_stays_zero_in_training(name: str, dtype: torch.dtype) -> None:
    flow = model(dtype=dtype)
    before = flow.stored_weights
    optimizer = OPTIMIZERS[name](list(flow.parameters()))
    data = correlated(64, 29, dtype=dtype)
    start = {key: value.detach().clone() for key, value in flow.named_parameters()}
    for _ in range(12):
        optimizer.zero_grad()
        (-flow.log_prob(data).mean()).backward()
        check_padding(flow, name)
        optimizer.step()
        check_padding(flow, name)
    assert all(not torch.equal(value, start[key]) for key, value in flow.named_parameters()), "something did not train"
    state = [s for per in optimizer.state.values() for s in per.values() if torch.is_tensor(s) and s.dim() > 0]
    for _, layer, where in paddings(flow):
        for key, moment in optimizer.state[layer.weight].items():
            if torch.is_tensor(moment) and moment.dim() > 0 and name != "Adagrad":
                assert torch.equal(moment[where], torch.zeros_like(moment[where])), f"{name}: state {key}"
    if name in ("Adam", "Adam fused", "AdamW", "AdamW fused"):
        biases = sum(p.numel() for key, p in flow.named_parameters() if key.endswith("bias"))
        assert sum(s.numel() for s in state) == 2 * (before + biases)


def test_gradients_through_samples_leave_the_padding_alone() -> None:
    flow = model()
    flow.rsample(5, generator=generator()).square().sum().backward()
    check_padding(flow, "through sample")


def test_accumulated_gradients_leave_the_padding_alone() -> None:
    flow = model()
    for seed in range(3):
        flow.log_prob(normal(1, 29, seed=seed, dtype=torch.float32)).sum().backward()
    check_padding(flow, "accumulated")


def test_loading_a_dense_weight_drops_what_the_mask_hides() -> None:
    layer = blocks_of(model())[0].made.output
    rows, columns = layer.bias.shape[0], layer.layout.in_features
    dense = normal(rows, columns, dtype=torch.float32)
    layer.load_dense_(dense, normal(rows, dtype=torch.float32))
    assert torch.equal(layer.dense_weight(), dense * layer.layout.mask())
    assert layer.layout.padding_is_zero(layer.weight)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Lets torch.empty and its kin return NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "memory is not poisoned: this test would prove nothing"
    yield
    torch.use_deterministic_algorithms(before)


def everything(batch: int, degrees: object) -> dict[str, Tensor]:
    """Builds a model and returns the results of all its methods."""
    flow = build(29, hidden_features=(23, 17), degrees=degrees, order="random", seed=3, dtype=torch.float32)
    x = normal(batch, 29, dtype=torch.float32).requires_grad_()
    z, ladj = flow(x)
    (z.square().sum() + ladj.sum()).backward()
    result = {"z": z, "ladj": ladj, "terms": flow.nll_per_dim(x), "gradient of x": x.grad}
    result |= {f"gradient of {name}": p.grad for name, p in flow.named_parameters()}
    with torch.no_grad():
        result["x"], result["ladj of the inverse"] = flow.inverse(x)
        result["x of the naive"] = flow.to_naive().log_prob(x)
    return {key: value.detach() for key, value in result.items()}


@pytest.mark.parametrize("degrees", ["spread", "random", "explicit"])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_nothing_reads_memory_that_nobody_wrote(batch: int, degrees: object, request: pytest.FixtureRequest) -> None:
    if degrees == "explicit":  # rows that see nothing, units that see everything, units that no output reads
        degrees = [torch.tensor([0] * 10 + [29] * 13), torch.tensor([0, 29, 5, 7, 7] + [29] * 12)]
    clean = everything(batch, degrees)
    request.getfixturevalue("poisoned_memory")
    poisoned = everything(batch, degrees)
    for name, value in clean.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, poisoned[name]), f"{name} depends on uninitialised memory"


def test_samples_backward_reads_no_poison(poisoned_memory: None) -> None:
    flow = model()
    flow.rsample(3, generator=generator()).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in flow.parameters())
