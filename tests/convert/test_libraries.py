"""Flows of nflows, zuko and normflows, as those libraries compute them and after their conversion."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fastmaf
from tests.convert.sources import (
    ACTIVATIONS,
    FEATURES,
    WIDTHS,
    close,
    float64,
    nflows,
    normal_flow,
    normflows,
    seeded,
    trained,
    zuko,
)
from tests.tolerances import F32, F64

__all__ = ["float64"]  # a fixture
from nflows import distributions, transforms
from zuko.bayesian import BayesianModel


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nflows(data: st.DataObject) -> None:
    features, context = data.draw(FEATURES), data.draw(st.sampled_from([None, 1, 5]))
    residual, layers = data.draw(st.booleans()), []
    for _ in range(data.draw(st.integers(1, 3))):
        permutation = data.draw(st.sampled_from([transforms.RandomPermutation, transforms.ReversePermutation]))
        layers.append(permutation(features))
        options: dict[str, Any] = {
            "num_blocks": data.draw(st.integers(0, 3)),
            "use_residual_blocks": residual,
            "random_mask": not residual and data.draw(st.booleans()),
            "activation": data.draw(ACTIVATIONS),
            "dropout_probability": data.draw(st.sampled_from([0.0, 0.3])),
            "use_batch_norm": data.draw(st.booleans()),
            "context_features": context,
        }
        layers.append(transforms.MaskedAffineAutoregressiveTransform(features, data.draw(WIDTHS), **options))
        if data.draw(st.booleans()):
            layers.append(transforms.BatchNorm(features))
        if data.draw(st.booleans()):
            layers.append(transforms.ActNorm(features))
    embedding = None if context is None else nn.Linear(2, context)
    source = nflows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([features]), embedding)
    x = torch.randn(9, features)
    c = None if context is None else torch.randn(9, 2)
    trained(source, lambda: -source.log_prob(x, c).mean())
    flow = fastmaf.accelerate(source)
    close(flow.log_prob(x, c), source.log_prob(x, c))  # type: ignore[operator]
    close(flow.transform_to_noise(x, c), source.transform_to_noise(x, c))  # type: ignore[operator]
    close(seeded(lambda: flow.sample(3, c)), seeded(lambda: source.sample(3, c)))  # type: ignore[operator]
    for found, expected in zip(*(seeded(lambda f=f: f.sample_and_log_prob(2, c)) for f in (flow, source)), strict=True):
        close(found, expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_zuko(data: st.DataObject) -> None:
    features = data.draw(FEATURES)
    context = data.draw(st.sampled_from([0, 1, 5])) if features > 1 else 0
    options: dict[str, Any] = {}
    if features > 1:
        widths = data.draw(st.lists(WIDTHS, min_size=1, max_size=4))
        passes = data.draw(st.sampled_from([None, 2, 3]))
        activation = data.draw(st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.Identity]))
        options = {"hidden_features": widths, "passes": passes, "activation": activation}
        options |= {"residual": data.draw(st.booleans())}
    source = zuko.flows.MAF(features, context, data.draw(st.integers(1, 3)), data.draw(st.booleans()), **options)
    x = torch.randn(9, features)
    c = torch.randn(9, context) if context else None
    trained(source, lambda: -source(c).log_prob(x).mean())
    flow = fastmaf.accelerate(source)
    close(flow(c).log_prob(x), source(c).log_prob(x))
    close(seeded(lambda: flow(c).sample((3,))), seeded(lambda: source(c).sample((3,))))
    for found, expected in zip(
        *(seeded(lambda f=f: f(c).rsample_and_log_prob((2,))) for f in (flow, source)), strict=True
    ):
        close(found, expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_normflows(data: st.DataObject) -> None:
    features, layers = data.draw(FEATURES), []
    for _ in range(data.draw(st.integers(1, 3))):
        residual = data.draw(st.booleans())
        options: dict[str, Any] = {
            "num_blocks": data.draw(st.integers(0, 3)),
            "use_residual_blocks": residual,
            "random_mask": not residual and data.draw(st.booleans()),
            "activation": data.draw(ACTIVATIONS),
            "use_batch_norm": False,
        }
        layer = normflows.flows.MaskedAffineAutoregressive(features, data.draw(WIDTHS), **options)
        layers.append(normflows.flows.Reverse(layer) if data.draw(st.booleans()) else layer)
        if features > 1:
            layers.append(normflows.flows.Permute(features, data.draw(st.sampled_from(["shuffle", "swap"]))))
        if data.draw(st.booleans()):
            layers.append(normflows.flows.AffineConstFlow((features,)))
    source = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(features), layers)
    x = torch.randn(9, features)
    trained(source, lambda: source.forward_kld(x))
    flow = fastmaf.accelerate(source)
    close(flow.log_prob(x), source.log_prob(x))  # type: ignore[operator]
    for found, expected in zip(*(seeded(lambda f=f: f.sample(3)) for f in (flow, source)), strict=True):
        close(found, expected)


def test_batch_shapes_of_zuko() -> None:
    source = zuko.flows.MAF(4, 3, transforms=2, hidden_features=(8, 8))
    flow = fastmaf.accelerate(source)
    one, many = torch.randn(3), torch.randn(5, 2, 3)
    for c, x in (
        (one, torch.randn(4)),
        (one, torch.randn(6, 4)),
        (many, torch.randn(7, 5, 2, 4)),
    ):
        close(flow(c).log_prob(x), source(c).log_prob(x))
    assert flow(many).sample((7,)).shape == source(many).sample((7,)).shape == (7, 5, 2, 4)
    assert flow(many).batch_shape == (5, 2) and flow(many).event_shape == (4,)
    assert flow(one).expand((6,)).sample().shape == (6, 4)


def test_the_report_and_what_it_leaves_alone() -> None:
    torch.set_default_dtype(F32)
    source = nflows.MaskedAutoregressiveFlow(5, 16, 2, 2)
    before = copy.deepcopy(source.state_dict())
    flow = fastmaf.from_nflows(source)
    report = flow.parity_report(torch.randn(20, 5))
    assert [(one.dtype, one.what) for one in report] == [
        (dtype, what) for dtype in (F64, F32) for what in ("log_prob", "z", "inverse")
    ]
    for one in report:
        assert 0 <= one.mean <= one.worst < (1e-12 if one.dtype == F64 else 1e-4) and one.scale > 0.1
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert {parameter.dtype for parameter in flow.parameters()} == {F32}
    changed = dict(flow.flow.named_parameters())["transforms.1.made.output.bias"]
    with torch.no_grad():
        changed += 0.1
    assert min(one.worst for one in flow.parity_report(torch.randn(20, 5)) if one.what == "z") > 1e-3


def test_converted_flows_are_flows(tmp_path: Any) -> None:
    """They are saved, loaded and trained as those of this library."""
    source = zuko.flows.MAF(3, transforms=2).to(F32)
    flow, x = fastmaf.from_zuko(source).flow, torch.randn(50, 3, dtype=F32)
    flow.save(tmp_path / "flow.safetensors")
    loaded = fastmaf.load(tmp_path / "flow.safetensors")
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))
    step = fastmaf.TrainingStep(loaded, torch.optim.Adam(loaded.parameters(), lr=1e-2))
    losses = [step(x).nll for _ in range(20)]
    assert losses[-1] < losses[0] - 0.05


def test_converted_inverse_flows_are_saved(tmp_path: Any) -> None:
    source = normal_flow(normflows.flows.MaskedAffineAutoregressive(4, 8)).double()
    flow, x = fastmaf.from_normflows(source).flow, torch.randn(5, 4, dtype=torch.float64)
    flow.save(tmp_path / "flow.safetensors")
    close(fastmaf.load(tmp_path / "flow.safetensors").log_prob(x), source.log_prob(x))


def test_converted_samples_are_differentiable() -> None:
    source = zuko.flows.MAF(3, 2, transforms=2)
    flow, c = fastmaf.from_zuko(source), torch.randn(4, 2, requires_grad=True)
    grads = [torch.autograd.grad(seeded_rsample(f, c).square().sum(), c, retain_graph=True)[0] for f in (flow, source)]
    close(*grads)


def seeded_rsample(flow: Any, c: Tensor) -> Tensor:
    torch.manual_seed(7)
    result: Tensor = flow(c).rsample()
    return result


def test_a_context_is_neither_forgotten_nor_invented() -> None:
    flow = fastmaf.from_zuko(zuko.flows.MAF(3, 2))
    with pytest.raises(ValueError, match="with a context; expected one"):
        flow()
    with pytest.raises(ValueError, match="no context; expected None"):
        fastmaf.from_zuko(zuko.flows.MAF(3))(torch.randn(2))
    with pytest.raises(fastmaf.NotConvertibleError, match="context"):
        _ = flow.flow


def test_edited_masks_and_subclasses_that_change_nothing() -> None:
    class Named(nflows.Flow):  # type: ignore[misc]
        def description(self) -> str:
            return "a name"

    transform = transforms.MaskedAffineAutoregressiveTransform(4, 8)
    transform.autoregressive_net.initial_layer.mask *= 0.5
    transform.autoregressive_net.blocks[0].linear_layers[0].mask[::2] = 0
    source = Named(transform, distributions.StandardNormal([4])).requires_grad_(False)
    flow, x = fastmaf.from_nflows(source), torch.randn(9, 4)
    close(flow.log_prob(x), source.log_prob(x))
    assert not any(parameter.requires_grad for parameter in flow.parameters())


class Affine(transforms.MaskedAffineAutoregressiveTransform):  # type: ignore[misc]
    """Another least scale, set where nflows sets its own."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__(features, width)
        self._epsilon = 0.05


def test_subclasses_of_transforms_that_change_no_method() -> None:
    source = nflows.Flow(Affine(4, 8), distributions.StandardNormal([4]))
    flow, x = fastmaf.from_nflows(source), torch.randn(9, 4)
    close(flow.log_prob(x), source.log_prob(x))


@pytest.mark.parametrize("training", [True, False])
def test_other_versions_of_a_library_are_found_out(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """A class that computes something else, with the attributes that are known."""
    normal = distributions.StandardNormal([4])
    of_nflows = nflows.Flow(transforms.MaskedAffineAutoregressiveTransform(4, 8, context_features=2), normal)
    of_zuko = zuko.flows.MAF(4, 2)
    of_normflows = normal_flow(normflows.flows.MaskedAffineAutoregressive(4, 8))
    for source in (of_nflows, of_zuko, of_normflows):
        source.train(training)
        flow = fastmaf.accelerate(source)
        assert all(module.training == training for module in (*source.modules(), *flow.modules()))

    def halved(forward: Any) -> Any:
        """Another function of the library's own module."""
        other = lambda *args: forward(*args) / 2  # noqa: E731
        return types.FunctionType(other.__code__, forward.__globals__, closure=other.__closure__)

    for module in (transforms.made.MADE, zuko.nn.MaskedMLP, normflows.nets.made.MADE):
        monkeypatch.setattr(module, "forward", halved(module.forward))
    for source in (of_nflows, of_zuko, of_normflows):
        with pytest.raises(fastmaf.NotConvertibleError, match="does not compute what its class is known for"):
            fastmaf.accelerate(source)


def test_flows_without_parameters() -> None:
    source = nflows.Flow(transforms.RandomPermutation(4), distributions.StandardNormal([4]))
    flow = fastmaf.from_nflows(source)
    close(seeded(lambda: flow.sample(3)), seeded(lambda: source.sample(3)))


def test_the_width_of_x_is_checked_with_a_context_too() -> None:
    transform = transforms.MaskedAffineAutoregressiveTransform(4, 8, context_features=2)
    flow = fastmaf.from_nflows(nflows.Flow(transform, distributions.StandardNormal([4])))
    with pytest.raises(ValueError, match=r"expected a tensor \[N, 4\]; found \[3, 5\]"):
        flow.log_prob(torch.randn(3, 5), torch.randn(3, 2))


def test_inverse_transforms_of_nflows() -> None:
    of = transforms.MaskedAffineAutoregressiveTransform
    spline = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(4, 8, tails="linear", tail_bound=3.0)
    inner = [of(4, 8), transforms.RandomPermutation(4), spline, transforms.InverseTransform(of(4, 8))]
    inverse = transforms.InverseTransform(transforms.CompositeTransform(inner))
    source = nflows.Flow(transforms.CompositeTransform([of(4, 8), inverse]), distributions.StandardNormal([4]))
    x = torch.randn(9, 4)
    trained(source, lambda: -source.log_prob(x).mean())
    flow = fastmaf.accelerate(source)
    close(flow.log_prob(x), source.log_prob(x))  # type: ignore[operator]
    close(seeded(lambda: flow.sample(3)), seeded(lambda: source.sample(3)))  # type: ignore[operator]


def test_inverse_transforms_of_zuko() -> None:
    lazy, maf = zuko.lazy, zuko.flows.MAF(4, transforms=3, hidden_features=(8,))
    first, second, third = maf.transform.transforms
    source = zuko.flows.Flow([first, lazy.LazyComposedTransform(second, third).inv], maf.base)
    x = torch.randn(9, 4)
    trained(source, lambda: -source().log_prob(x).mean())
    flow = fastmaf.accelerate(source)
    close(flow().log_prob(x), source().log_prob(x))
    close(seeded(lambda: flow().sample((3,))), seeded(lambda: source().sample((3,))))


def test_a_flow_that_is_drawn_from_a_bayesian_model() -> None:
    model = BayesianModel(zuko.flows.MAF(4, transforms=2, hidden_features=(8,)), init_logvar=-3.0)
    source, x = model.sample_model(), torch.randn(9, 4)
    close(fastmaf.accelerate(source)().log_prob(x), source().log_prob(x))
    with model.reparameterize() as source, torch.no_grad():
        close(fastmaf.accelerate(source)().log_prob(x), source().log_prob(x))
    with model.reparameterize(local_trick=True) as source, pytest.raises(fastmaf.NotConvertibleError, match="forward"):
        fastmaf.accelerate(source)


def test_a_base_that_was_rounded() -> None:
    """A flow that was trained in float32 and is evaluated in float64 keeps the constant of its base rounded."""
    source, x = nflows.MaskedAutoregressiveFlow(5, 16, 2, 2).float().double(), torch.randn(9, 5)
    flow = fastmaf.accelerate(source)
    close(flow.log_prob(x), source.log_prob(x))  # type: ignore[operator]
    for found, expected in zip(*(seeded(lambda f=f: f.sample_and_log_prob(3)) for f in (flow, source)), strict=True):
        close(found, expected)


def test_large_scales_are_those_of_the_softplus_of_torch(backend: str) -> None:
    """Above 20 it is its argument, which differs from log(1 + e^u) by more than the conversion may."""
    transform = transforms.MaskedAffineAutoregressiveTransform(8, 8)
    source = nflows.Flow(transform, distributions.StandardNormal([8]))
    raw = torch.linspace(18.5, 32.5, 8)
    with torch.no_grad():
        transform.autoregressive_net.final_layer.weight.zero_()
        bias = transform.autoregressive_net.final_layer.bias.view(8, 2)
        bias[:, 0], bias[:, 1] = raw, -functional.softplus(raw) - 1e-3  # z = s x + t cancels at x = 1
    flow, x = fastmaf.from_nflows(source), torch.ones(3, 8)
    for of in (flow, source):
        assert float(of.transform_to_noise(x).detach().abs().max()) < 1e-13
        of.log_prob(x).sum().backward()
    expected = transform.autoregressive_net.final_layer.bias.grad.view(8, 2)[:, 0]
    output = flow.flow._mades()[0].output.bias.grad
    assert output is not None
    torch.testing.assert_close(output.view(8, 2)[:, 1], expected, rtol=1e-11, atol=0)
