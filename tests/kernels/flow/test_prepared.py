"""Flows whose tensors are looked at once per call: every change of them is seen, on the way to data and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf import kernels
from fastmaf.kernels import native_library
from fastmaf.training.direct_loss import DirectLoss
from tests.core.helpers import blocks_of, build, generator, normal
from tests.kernels.cases import needs
from tests.tolerances import F32, F64, assert_close, error

pytestmark = needs("native")

D = 13


def model(**options: Any) -> fastmaf.MAF:
    return build(D, **{"order": "random", "degrees": "random", "hidden_features": (20, 31), "scale": 1.5, **options})


def found(flow: Any, x: Tensor, direct: bool) -> list[Tensor]:
    """Returns densities without and with gradients, samples, the gradients, and those of a loss without autograd."""
    with torch.no_grad():
        quiet, samples = flow.log_prob(x), flow.sample(3, generator=generator(4))
    trained = [p for p in flow.parameters() if p.requires_grad]
    density = flow.log_prob(x)
    assert density.requires_grad == bool(trained)
    results = [quiet, density.detach(), samples]
    if trained:
        results += torch.autograd.grad(density.sin().sum(), trained)
    if direct:
        loss = DirectLoss.of(flow, x)
        assert loss is not None
        loss.backward()
        results += [loss.value, *(p.grad for p in flow.parameters())]
        flow.zero_grad()
    return results


def agree(flow: Any, dtype: torch.dtype = F64, n: int = 5) -> list[Tensor]:
    """Returns what is found on the native backend; fails unless the torch backend finds it with a copy."""
    x, twin = normal(n, D, dtype=dtype, seed=n), copy.deepcopy(flow)
    direct = n > 0 and all(p.requires_grad and p.is_contiguous() for p in flow.parameters())
    with kernels.use_backend("torch"):
        expected = found(twin, x, direct)
    with kernels.use_backend("native"):
        actual = found(flow, x, direct)
    assert len(actual) == len(expected)
    for value, other in zip(actual, expected, strict=True):
        assert_close("gradients", value, other)
    return actual


def each(change: Callable[[Any], Any]) -> Callable[[fastmaf.MAF], None]:
    def run(flow: fastmaf.MAF) -> None:
        for parameter in flow.parameters():
            change(parameter)

    return run


def in_place(flow: fastmaf.MAF) -> None:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.1)


def scaled(flow: fastmaf.MAF) -> dict[str, Tensor]:
    return {name: 1.1 * t if t.is_floating_point() else t for name, t in flow.state_dict().items()}


def other_permutations(flow: fastmaf.MAF) -> None:
    for i, transform in enumerate(flow.transforms):
        if isinstance(transform, fastmaf.Permutation):
            transform.permutation.numpy()[:] = torch.randperm(D, generator=generator(i)).numpy()


CHANGES: dict[str, Callable[[fastmaf.MAF], Any]] = {
    "in place": in_place,
    "padding": each(lambda p: p.data.add_(0.1)),
    "through NumPy": each(lambda p: p.detach().numpy().__imul__(1.1)),
    "other memory": each(lambda p: setattr(p, "data", 1.1 * p.data)),
    "a part of other memory": each(lambda p: setattr(p, "data", torch.cat((p.data, 1.1 * p.data))[len(p) :])),
    "strided memory": each(lambda p: setattr(p, "data", torch.stack((1.1 * p.data, p.data), dim=1)[:, 0])),
    "loaded": lambda flow: flow.load_state_dict(scaled(flow)),
    "assigned": lambda flow: flow.load_state_dict(scaled(flow), assign=True),
    "new parameters": lambda flow: setattr(
        blocks_of(flow)[1].made.output, "weight", torch.nn.Parameter(2 * blocks_of(flow)[1].made.output.weight.detach())
    ),
    "permutations": other_permutations,
    "a bound": lambda flow: setattr(blocks_of(flow)[0], "log_scale_bound", 1e-2),
    "another block": lambda flow: flow.transforms.__setitem__(
        list(flow.transforms).index(blocks_of(flow)[0]), copy.deepcopy(blocks_of(model(seed=7))[0])
    ),
    "a step": lambda flow: fastmaf.optim.FusedAdam(flow.parameters(), lr=0.1).minimize(
        -flow.log_prob(normal(4, D)).mean()
    ),
    "a direct step": lambda flow: fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=0.1))(
        normal(64, D)
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    flow = model()
    before = agree(flow)
    for _ in range(2):
        CHANGES[change](flow)
        flow.zero_grad()
        assert not torch.equal(agree(flow)[0], before[0]), "the change changes nothing"


def test_dtypes_in_turn() -> None:
    flow = model()
    for dtype in (F64, F32, F64):
        agree(flow.to(dtype), dtype)
        with pytest.raises(ValueError, match="like the flow"):
            flow.log_prob(normal(3, D, dtype=F32 if dtype == F64 else F64))
    agree(flow.float().to_inference(), F32)


def test_another_device_is_named() -> None:
    flow = model()
    agree(flow)
    with pytest.raises(ValueError, match="on meta, like the flow"):
        flow.to("meta").log_prob(normal(3, D))


def test_frozen_parameters() -> None:
    flow = model()
    agree(flow)
    bias = blocks_of(flow)[0].made.output.bias
    for frozen in ([bias], list(flow.parameters()), list(flow.parameters())[:-1], [], [bias]):
        flow.requires_grad_(True)
        for parameter in frozen:
            parameter.requires_grad_(False)
        agree(flow)
    flow.log_prob(normal(3, D)).sum().backward()
    assert bias.grad is None and all(p.grad is not None for p in flow.parameters() if p is not bias)


@pytest.mark.parametrize("n", [0, 1, 3, 17, 100])
def test_batches(n: int) -> None:
    flow = model()
    agree(flow, n=n)
    wide = normal(n, 2 * D)
    assert torch.equal(flow.log_prob(wide[:, ::2]), flow.log_prob(wide[:, ::2].contiguous()))


def test_memory_that_moves_before_the_backward_pass() -> None:
    flow, x = model(), normal(5, D)
    expected = torch.autograd.grad(flow.log_prob(x).sum(), list(flow.parameters()))
    density = flow.log_prob(x)
    for parameter in flow.parameters():
        old, parameter.data = parameter.data, parameter.data.clone()
        old.fill_(math.nan)
    for actual, other in zip(torch.autograd.grad(density.sum(), list(flow.parameters())), expected, strict=True):
        assert_close("gradients", actual, other)


@pytest.mark.parametrize("names", [("native", "torch"), ("torch", "native")])
def test_a_backward_pass_on_another_backend(names: tuple[str, str]) -> None:
    flow, x = model(), normal(21, D)
    expected = [g.clone() for g in torch.autograd.grad(flow.log_prob(x).mean(), list(flow.parameters()))]
    with kernels.use_backend(names[0]):
        density, direct = flow.log_prob(x), DirectLoss.of(flow, x)
    with kernels.use_backend(names[1]):
        grads = torch.autograd.grad(density.mean(), list(flow.parameters()))
        assert direct is not None
        direct.backward()
    for parameter, grad, other in zip(flow.parameters(), grads, expected, strict=True):
        assert_close("gradients", grad, other)
        assert_close("gradients", parameter.grad, -other)
    flow.zero_grad()
    optimizer, twin = fastmaf.optim.FusedAdam(flow.parameters()), copy.deepcopy(flow)
    with kernels.use_backend(names[0]):
        loss = -flow.log_prob(x).mean()
    with kernels.use_backend(names[1]):
        optimizer.minimize(loss)
    fastmaf.optim.FusedAdam(twin.parameters()).minimize(-twin.log_prob(x).mean())
    for actual, other in zip(flow.parameters(), twin.parameters(), strict=True):
        assert error(actual, other) <= 1e-9  # Adam divides by the gradient's own size


def test_constants_that_are_written_to_are_refused() -> None:
    flow, x = model(), normal(5, D)
    layer = blocks_of(flow)[1].made.hidden[1]
    assert isinstance(layer, fastmaf.MaskedLinear)
    expected = flow.log_prob(x)
    for constant in (layer.prefix, layer.layout.panels):
        kept = constant.clone()
        constant.add_(100)
        for call in (lambda: flow.log_prob(x), lambda: flow(x), lambda: flow.sample(2)):
            with pytest.raises(ValueError, match="prefix and panels"):
                call()
        constant.copy_(kept)
        assert torch.equal(flow.log_prob(x), expected)


def test_memory_of_constants_that_is_replaced_is_not_read() -> None:
    flow, x = model(), normal(5, D)
    expected, samples = flow.log_prob(x), flow.sample(4, seed=1)
    for block in blocks_of(flow):
        for layer in block.made.layers:
            layer.prefix.data = layer.prefix.data + 10**6
            layer.layout.panels.data = layer.layout.panels.data + 10**6
        block.made.schedule.data = block.made.schedule.data + 10**6
    assert torch.equal(flow.log_prob(x), expected) and torch.equal(flow.sample(4, seed=1), samples)


def test_threads_instruction_sets_and_backends_in_turn() -> None:
    flow, threads, used = model(), torch.get_num_threads(), native_library.build_info().split()[0]
    try:
        for name in native_library.isas():
            native_library.use_isa(name)
            for count in (1, 2):
                torch.set_num_threads(count)
                agree(flow, n=33)
    finally:
        native_library.use_isa(used)
        torch.set_num_threads(threads)


def test_derivatives_of_higher_order_and_of_the_input() -> None:
    flow, x = model(hidden_features=(5, 4)), normal(3, D).requires_grad_()
    results = []
    for backend in ("native", "torch"):
        with kernels.use_backend(backend):
            (first,) = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)
            results.append([first, *torch.autograd.grad(first.square().sum(), [x, *flow.parameters()])])
    for actual, expected in zip(*results, strict=True):
        assert_close("gradients", actual, expected)


def test_gradients_add_up_and_tensors_between_have_hooks() -> None:
    flow, x, seen = model(), normal(5, D), []
    density = flow.log_prob(x)
    density.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    density.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in flow.parameters()]  # type: ignore[union-attr]
    density.sum().backward()
    assert len(seen) == 2 and torch.equal(seen[0], torch.ones(5, dtype=F64))
    expected = torch.autograd.grad(flow.log_prob(x).sum(), list(flow.parameters()))
    for parameter, first, grad in zip(flow.parameters(), once, expected, strict=True):
        assert_close("gradients", first, 2 * grad)
        assert_close("gradients", parameter.grad, 4 * grad)
    with pytest.raises(RuntimeError, match="second time"):
        density.sum().backward()


def test_a_flow_of_inference_tensors() -> None:
    flow, x = model(), normal(5, D)
    with torch.inference_mode():
        for parameter in flow.parameters():
            parameter.data = 1.1 * parameter.data
        for _ in range(2):
            for parameter in flow.parameters():
                parameter.data.add_(0.1)
            assert_close("values", flow.log_prob(x), flow.to_naive().log_prob(x))
