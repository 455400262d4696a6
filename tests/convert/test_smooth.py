"""Flows of other libraries with activations that are not piecewise linear."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import fastmaf
from tests.tolerances import F32, F64

nflows = pytest.importorskip("nflows.flows")
zuko = pytest.importorskip("zuko")
normflows = pytest.importorskip("normflows")
from nflows import distributions, transforms  # noqa: E402

# After these: of a module that skips itself a part would be imported.
from tests.convert.sources import FEATURES, WIDTHS, close, seeded, trained  # noqa: E402

FUNCTIONS = st.sampled_from([functional.elu, functional.gelu, functional.silu, torch.tanh, nn.ELU(), nn.Tanh()])
MODULES = st.sampled_from([nn.ELU, nn.GELU, nn.SiLU, nn.Tanh])
SPLINE = functools.partial(
    transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform, tails="linear", tail_bound=3.0, num_bins=5
)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """nflows draws noise of the default dtype."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(F32)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_nflows(data: st.DataObject) -> None:
    features, context, layers = data.draw(FEATURES), data.draw(st.sampled_from([None, 1, 5])), []
    for _ in range(data.draw(st.integers(1, 2))):
        residual = data.draw(st.booleans())
        options: dict[str, Any] = {
            "num_blocks": data.draw(st.integers(0, 3)),
            "use_residual_blocks": residual,
            "random_mask": not residual and data.draw(st.booleans()),
            "activation": data.draw(FUNCTIONS),
            "dropout_probability": data.draw(st.sampled_from([0.0, 0.3])),
            "use_batch_norm": not residual and data.draw(st.booleans()),
            "context_features": context,
        }
        kind = data.draw(st.sampled_from([transforms.MaskedAffineAutoregressiveTransform, SPLINE]))
        layers += [transforms.RandomPermutation(features), kind(features, data.draw(WIDTHS), **options)]
    embedding = None if context is None else nn.Linear(2, context)
    source = nflows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([features]), embedding)
    x, c = torch.randn(9, features), None if context is None else torch.randn(9, 2)
    trained(source, lambda: -source.log_prob(x, c).mean())
    flow = fastmaf.accelerate(source)
    close(flow.log_prob(x, c), source.log_prob(x, c))  # type: ignore[operator]
    close(flow.transform_to_noise(x, c), source.transform_to_noise(x, c))  # type: ignore[operator]
    close(seeded(lambda: flow.sample(3, c)), seeded(lambda: source.sample(3, c)))  # type: ignore[operator]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_zuko(data: st.DataObject) -> None:
    features, residual = data.draw(st.integers(2, 64)), data.draw(st.booleans())
    context = data.draw(st.sampled_from([0, 1, 5]))
    widths = data.draw(st.lists(WIDTHS, min_size=1, max_size=4))
    options: dict[str, Any] = {
        "hidden_features": [widths[0]] * len(widths) if residual else widths,
        "passes": data.draw(st.sampled_from([None, 2, 3])),
        "activation": data.draw(MODULES),
        "residual": residual,
    }
    kind = data.draw(st.sampled_from([zuko.flows.MAF, functools.partial(zuko.flows.NSF, bins=4)]))
    source = kind(features, context, transforms=2, randperm=data.draw(st.booleans()), **options)
    x, c = torch.randn(9, features), torch.randn(9, context) if context else None
    trained(source, lambda: -source(c).log_prob(x).mean())
    flow = fastmaf.accelerate(source)
    close(flow(c).log_prob(x), source(c).log_prob(x))
    close(seeded(lambda: flow(c).sample((3,))), seeded(lambda: source(c).sample((3,))))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_normflows(data: st.DataObject) -> None:
    features, layers = data.draw(FEATURES), []
    for _ in range(data.draw(st.integers(1, 2))):
        residual = data.draw(st.booleans())
        options: dict[str, Any] = {
            "num_blocks": data.draw(st.integers(0, 3)),
            "use_residual_blocks": residual,
            "random_mask": not residual and data.draw(st.booleans()),
            "activation": data.draw(FUNCTIONS),
            "use_batch_norm": False,
        }
        layer = normflows.flows.MaskedAffineAutoregressive(features, data.draw(WIDTHS), **options)
        layers.append(normflows.flows.Reverse(layer) if data.draw(st.booleans()) else layer)
    source = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(features), layers)
    x = torch.randn(9, features)
    trained(source, lambda: source.forward_kld(x))
    flow = fastmaf.accelerate(source)
    close(flow.log_prob(x), source.log_prob(x))  # type: ignore[operator]
    for found, expected in zip(*(seeded(lambda f=f: f.sample(3)) for f in (flow, source)), strict=True):
        close(found, expected)


def refused() -> Iterator[tuple[str, Callable[[], nn.Module], str]]:
    def of(change: Callable[[Any], object] = lambda _: None, **options: Any) -> nn.Module:
        transform = transforms.MaskedAffineAutoregressiveTransform(4, 8, **options)
        change(transform.autoregressive_net)
        return nflows.Flow(transform, distributions.StandardNormal([4]))  # type: ignore[no-any-return]

    yield "ELU", lambda: of(activation=nn.ELU(alpha=2.0)), "activation ELU"
    yield "GELU", lambda: of(activation=nn.GELU(approximate="tanh")), "activation GELU"
    yield "partial", lambda: of(activation=functools.partial(functional.elu, alpha=2.0)), "activation partial"
    yield "batch norm", lambda: of(activation=torch.tanh, use_batch_norm=True), "batch normalisation in a residual"
    yield "in place", lambda: of(activation=nn.ELU(inplace=True)), "in place"

    def mix(net: Any) -> None:
        net.blocks[0].activation = functools.partial(functional.leaky_relu, negative_slope=0.3)

    yield "mixed", lambda: of(mix, activation=torch.tanh), "slope 0.3 beside"
    widths = {"hidden_features": (8, 9), "residual": True, "activation": nn.ELU}
    yield "widths", lambda: zuko.flows.MAF(4, transforms=1, **widths), "several widths"

    def leak(net: Any) -> None:
        net.final_layer.mask.fill_(1)

    yield "mask", lambda: of(leak, activation=torch.tanh), "own input"

    def hide(net: Any) -> None:
        net.initial_layer.mask[4:] = 0

    yield "degrees", lambda: of(hide, activation=torch.tanh), "residual block can see"


@pytest.mark.parametrize("make, message", [pytest.param(make, text, id=name) for name, make, text in refused()])
def test_what_is_refused_is_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(fastmaf.NotConvertibleError, match=message):
        fastmaf.accelerate(make())


def test_activations_may_differ_between_layers() -> None:
    transform = transforms.MaskedAffineAutoregressiveTransform(4, 8, num_blocks=3, activation=torch.tanh)
    for block, activation in zip(
        transform.autoregressive_net.blocks, (functional.relu, functional.leaky_relu, functional.silu), strict=True
    ):
        block.activation = activation
    source, x = nflows.Flow(transform, distributions.StandardNormal([4])), torch.randn(9, 4)
    trained(source, lambda: -source.log_prob(x).mean())
    flow = fastmaf.from_nflows(source)
    close(flow.log_prob(x), source.log_prob(x))
    made = flow.flow._mades()[0]
    assert made.activations == ["relu", "relu", "leaky_relu", "leaky_relu", "silu", "silu", "identity"]


@pytest.mark.parametrize(
    "options", [{"use_residual_blocks": False, "use_batch_norm": True}, {}, {"context_features": 2}]
)
def test_masks_of_other_numbers_are_multiplied_once(options: dict[str, Any]) -> None:
    transform = transforms.MaskedAffineAutoregressiveTransform(4, 8, activation=torch.tanh, **options).double()
    for module in transform.modules():
        if hasattr(module, "mask"):
            module.mask *= 0.3 + torch.rand_like(module.mask)
    source = nflows.Flow(transform, distributions.StandardNormal([4]))
    x, c = torch.randn(9, 4), torch.randn(9, 2) if "context_features" in options else None
    trained(source, lambda: -source.log_prob(x, c).mean())
    close(fastmaf.accelerate(source).log_prob(x, c), source.log_prob(x, c))  # type: ignore[operator]


def test_converted_flows_are_saved(tmp_path: Any) -> None:
    source = zuko.flows.MAF(5, transforms=2, activation=nn.SiLU, residual=True, hidden_features=(16, 16))
    flow, x = fastmaf.from_zuko(source).flow, torch.randn(9, 5)
    flow.save(tmp_path / "flow.safetensors")
    assert torch.equal(fastmaf.load(tmp_path / "flow.safetensors").log_prob(x), flow.log_prob(x))
