"""Hooks, parametrisations, pruning and replaced modules take effect."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import parametrizations, parametrize, prune

import fastmaf
from tests.core.helpers import blocks_of, build, generator, layers_of, normal
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES = 13
USES: dict[str, Callable[[fastmaf.Flow], Any]] = {
    "log_prob": lambda flow: flow.log_prob(normal(4, FEATURES)),
    "forward": lambda flow: flow(normal(4, FEATURES))[0],
    "nll_per_dim": lambda flow: flow.nll_per_dim(normal(4, FEATURES)),
    "inverse": lambda flow: flow.inverse(normal(4, FEATURES))[0],
    "sample": lambda flow: flow.sample(4, generator=generator()),
    "rsample": lambda flow: flow.rsample(4, generator=generator()),
}


def model(**options: Any) -> fastmaf.MAF:
    return build(FEATURES, hidden_features=(11, 7), degrees="random", order="random", **options)


def plain(flow: fastmaf.MAF) -> fastmaf.MAF:
    """Returns the same function without hooks: the weights as they are used now."""
    twin = model()
    for target, layer in zip(layers_of(twin).values(), layers_of(flow).values(), strict=True):
        target.load_dense_(layer.dense_weight(), layer.bias.detach())
    for target, block in zip(blocks_of(twin), blocks_of(flow), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(target.made.degrees, block.made.degrees, strict=True))
    return twin


@pytest.mark.parametrize("use", USES)
def test_forward_hooks_fire_and_change_nothing(use: str, backend: str) -> None:
    expected = USES[use](model())
    for chosen in ("transforms.1.made.output", "transforms.1.made.hidden.0", "transforms.1.made"):
        flow, fired = model(), []
        flow.get_submodule(chosen).register_forward_hook(lambda *_, name=chosen, fired=fired: fired.append(name))
        assert_close("values" if use != "sample" else "inverse", USES[use](flow), expected)
        assert fired and set(fired) == {chosen}


@pytest.mark.parametrize("use", ["log_prob", "forward", "nll_per_dim"])
def test_every_module_is_called(use: str, backend: str) -> None:
    flow, fired = model(), []
    for name, module in flow.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
    USES[use](flow)
    called = {name for name, module in flow.named_modules() if not isinstance(module, nn.ModuleList)}
    called -= {"log_prob": set(), "forward": {"base"}, "nll_per_dim": {"", "base"}}[use]
    assert set(fired) == called
    if use != "nll_per_dim":
        assert len(fired) == len(called), "each of them once"


def test_a_hook_of_the_base_alone(backend: str) -> None:
    flow, x = model(), normal(4, FEATURES)
    expected = flow.log_prob(x) + 1
    flow.base.register_forward_hook(lambda module, given, log_prob: log_prob + 1)
    assert_close("values", flow.log_prob(x), expected)


@pytest.mark.parametrize("use", ["log_prob", "nll_per_dim", "inverse"])
def test_what_a_hook_returns_is_used(use: str, backend: str) -> None:
    """A hook that doubles the outputs of a layer has the effect of doubled weights and biases."""
    flow, other = model(), model()
    for block, twin in zip(blocks_of(flow), blocks_of(other), strict=True):
        block.made.hidden[0].register_forward_hook(lambda module, given, y: 2 * y)
        with torch.no_grad():
            twin.made.hidden[0].weight.mul_(2)  # type: ignore[operator, union-attr]
            twin.made.hidden[0].bias.mul_(2)  # type: ignore[operator, union-attr]
    assert_close("values", USES[use](flow), USES[use](other))


@pytest.mark.parametrize("kind", ["pre", "full_backward", "full_backward_pre", "instance forward", "permutation"])
def test_other_hooks(kind: str, backend: str) -> None:
    flow, fired = model(), []
    layer = blocks_of(flow)[0].made.output

    def note(*_: Any) -> None:
        fired.append(kind)

    if kind == "pre":
        layer.register_forward_pre_hook(note)
    elif kind == "full_backward":
        layer.register_full_backward_hook(note)
    elif kind == "full_backward_pre":
        layer.register_full_backward_pre_hook(note)
    elif kind == "permutation":
        next(t for t in flow.transforms if isinstance(t, fastmaf.Permutation)).register_forward_hook(note)
    else:
        forward = layer.forward
        layer.forward = lambda x: (note(), forward(x))[1]  # type: ignore[method-assign, assignment]
    loss, expected = flow.log_prob(normal(4, FEATURES)), model().log_prob(normal(4, FEATURES))
    loss.sum().backward()
    assert_close("values", loss, expected)
    assert fired == [kind]


@pytest.mark.parametrize(
    "register",
    [register_module_forward_hook, register_module_forward_pre_hook, register_module_full_backward_hook],
    ids=lambda function: function.__name__,
)
def test_global_hooks(register: Any, backend: str) -> None:
    flow, fired = model(), []
    expected = flow.log_prob(normal(4, FEATURES))
    handle = register(lambda module, *_: fired.append(module) and None)
    try:
        loss = flow.log_prob(normal(4, FEATURES))
        loss.sum().backward()
    finally:
        handle.remove()
    assert_close("values", loss, expected)
    assert {*layers_of(flow).values(), *blocks_of(flow)} <= set(fired)
    count = len(fired)
    flow.log_prob(normal(4, FEATURES))
    assert len(fired) == count


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight + 0.1  # fills the padding


class Adapted(nn.Module):
    """A wrapped layer with an additional parameter."""

    def __init__(self, layer: fastmaf.MaskedLinear) -> None:
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.full((), 1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.scale * self.layer(x)
        return result


def pruned(layer: fastmaf.MaskedLinear) -> None:
    prune.random_unstructured(layer, "weight", amount=0.5)


def parametrised(layer: fastmaf.MaskedLinear) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled())


def normed(layer: fastmaf.MaskedLinear) -> None:
    parametrizations.weight_norm(layer, dim=None)


def spectral(layer: fastmaf.MaskedLinear) -> None:
    parametrizations.spectral_norm(layer)
    layer.eval()  # in training mode each use takes a step of its power iteration


@contextlib.contextmanager
def _old_api() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def normed_in_a_hook(layer: fastmaf.MaskedLinear) -> None:
    with _old_api():
        nn.utils.weight_norm(layer, dim=None)


class EverySecond(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


def pruned_by_an_own_class(layer: fastmaf.MaskedLinear) -> None:
    EverySecond.apply(layer, "weight")


WEIGHTS = {f.__name__: f for f in (pruned, pruned_by_an_own_class, parametrised, normed, spectral, normed_in_a_hook)}


@pytest.mark.parametrize("which", ["hidden", "output", "all"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_that_are_computed(weights: str, which: str, backend: str) -> None:
    torch.manual_seed(0)
    flow = model()
    for name, layer in layers_of(flow).items():
        if which == "all" or which in name:
            WEIGHTS[weights](layer)
    flow.log_prob(normal(1, FEATURES))  # what a hook computes is there now
    twin = plain(flow)
    for use, function in USES.items():
        assert_close("inverse" if "sample" in use else "values", function(flow), function(twin), use)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_training_computed_weights(weights: str, backend: str) -> None:
    """Several steps with computed weights reduce the loss."""
    torch.manual_seed(0)
    flow, x = model(), normal(64, FEATURES)
    for layer in layers_of(flow).values():
        WEIGHTS[weights](layer)
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in flow.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    if weights == "pruned":
        for layer in layers_of(flow).values():
            layer(normal(1, layer.in_features))
            assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)  # type: ignore[operator]
    loss = -flow.rsample(5).square().mean()
    loss.backward()
    flow.rsample(5).square().mean().backward()


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["pruned", "old weight_norm"])
def test_dense_models_of_weights_that_hooks_compute(kind: str, name: str, backend: str) -> None:
    """``to_naive`` after an optimiser step uses weights that are computed anew."""
    flow, x = model(), normal(64, FEATURES)
    for layer in layers_of(flow).values():
        if kind == "pruned":
            prune.random_unstructured(layer, name, amount=0.5)
        else:
            with _old_api():
                nn.utils.weight_norm(layer, name, dim=None)
    (-flow.log_prob(x).mean()).backward()
    torch.optim.SGD(flow.parameters(), lr=0.1).step()
    naive = flow.to_naive()
    assert_close("values", naive.log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize("use", USES)
def test_replaced_layers(use: str, backend: str) -> None:
    flow, other = model(), model()
    for block, twin in zip(blocks_of(flow), blocks_of(other), strict=True):
        block.made.output = Adapted(block.made.output)  # type: ignore[assignment]
        with torch.no_grad():
            twin.made.output.weight.mul_(1.5)
            twin.made.output.bias.mul_(1.5)
    assert_close("values" if "sample" not in use else "inverse", USES[use](flow), USES[use](other))
    flow.log_prob(normal(4, FEATURES)).sum().backward()
    assert blocks_of(flow)[0].made.output.scale.grad != 0


def test_what_is_computed_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "flow.safetensors"
    for make in WEIGHTS.values():
        flow = model()
        make(blocks_of(flow)[1].made.output)
        with pytest.raises(TypeError, match=r"transforms\.\d\.made\.output computes its parameters from others"):
            flow.save(path)
    flow = model()
    blocks_of(flow)[0].made.output = Adapted(blocks_of(flow)[0].made.output)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"layer output of transforms\.\d\.made must be a MaskedLinear.*Adapted"):
        flow.save(path)
    assert not path.exists()
    flow = model()
    for layer in layers_of(flow).values():
        pruned(layer)
        prune.remove(layer, "weight")
    flow.save(path)
    assert_close("values", fastmaf.load(path).log_prob(normal(2, FEATURES)), flow.log_prob(normal(2, FEATURES)))


def test_hooks_that_are_removed_leave_one_op(backend: str) -> None:
    flow = model()
    handle = blocks_of(flow)[0].made.output.register_forward_hook(lambda *_: None)
    assert blocks_of(flow)[0].calls_modules
    handle.remove()
    assert not blocks_of(flow)[0].calls_modules
