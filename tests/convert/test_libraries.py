"""Flows of nflows, zuko and normflows, as those libraries compute them and after their conversion."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fastmaf
from tests.tolerances import F32, F64

nflows = pytest.importorskip("nflows.flows")
zuko = pytest.importorskip("zuko")
normflows = pytest.importorskip("normflows")
from nflows import distributions, transforms  # noqa: E402

TOLERANCE = 1e-9  # relative, in float64
FEATURES, WIDTHS = st.integers(1, 64), st.integers(1, 40)
ACTIVATIONS = st.sampled_from([functional.relu, torch.relu, functional.leaky_relu])


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """nflows draws noise of the default dtype."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(F32)


def trained(flow: nn.Module, loss: Callable[[], Tensor]) -> nn.Module:
    """Takes a few steps, so that no parameter or running statistic is at its start; then evaluates."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return flow.eval()


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error < TOLERANCE, f"relative error {error:.1e}"


def seeded(draw: Callable[[], Any]) -> Any:
    torch.manual_seed(7)
    with torch.no_grad():
        return draw()


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


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_splines(data: st.DataObject) -> None:
    features, library = data.draw(FEATURES), data.draw(st.sampled_from(["nflows", "zuko", "normflows"]))
    bins, width = data.draw(st.integers(2, 9)), data.draw(WIDTHS)
    context = data.draw(st.sampled_from([0, 3])) if library != "normflows" and features > 1 else 0
    x, c = 2 * torch.randn(9, features), torch.randn(9, context) if context else None
    if library == "zuko":
        features = max(2, features)
        x = 3 * torch.randn(9, features)
        source = zuko.flows.NSF(features, context, bins, transforms=2, hidden_features=(width, width))
        trained(source, lambda: -source(c).log_prob(x).mean())
        flow = fastmaf.accelerate(source)
        close(flow(c).log_prob(x), source(c).log_prob(x))
        close(seeded(lambda: flow(c).sample((3,))), seeded(lambda: source(c).sample((3,))))
    elif library == "nflows":
        of = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        tails = data.draw(st.sampled_from(["linear", None])) if not context else "linear"
        options: dict[str, Any] = {
            "num_bins": bins,
            "tails": tails,
            "tail_bound": 2.5,
            "context_features": context or None,
        }
        layers = [
            part for _ in range(2) for part in (of(features, width, **options), transforms.RandomPermutation(features))
        ]
        x = x if tails else torch.rand(9, features)
        source = nflows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([features]))
        trained(source, lambda: -source.log_prob(x, c).mean())
        flow = fastmaf.accelerate(source)
        close(flow.log_prob(x, c), source.log_prob(x, c))  # type: ignore[operator]
        if tails:
            close(seeded(lambda: flow.sample(3, c)), seeded(lambda: source.sample(3, c)))  # type: ignore[operator]
    else:
        spline = normflows.flows.AutoregressiveRationalQuadraticSpline
        layers = [spline(features, 1, width, num_bins=bins, init_identity=False) for _ in range(2)]
        source = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(features), layers)
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


def leaky(features: int) -> nn.Module:
    """A network whose outputs see their own inputs."""
    transform = transforms.MaskedAffineAutoregressiveTransform(features, 8, use_residual_blocks=False)
    mask = transform.autoregressive_net.final_layer.mask
    mask.fill_(1)
    return nflows.Flow(transform, distributions.StandardNormal([features]))


def refused() -> Iterator[tuple[str, Callable[[], nn.Module], str]]:
    normal = distributions.StandardNormal([4])

    def of(transform: Any) -> nn.Module:
        return nflows.Flow(transform, normal)

    affine = functools.partial(transforms.MaskedAffineAutoregressiveTransform, 4, 8)
    spline = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
    yield "spline", lambda: of(spline(4, 8, tails="linear", min_derivative=1e-2)), "smallest bins"
    cubic = transforms.MaskedPiecewiseCubicAutoregressiveTransform
    yield "cubic", lambda: of(cubic(4, features=4, hidden_features=8)), "MaskedPiecewiseCubic"
    yield "activation", lambda: of(affine(activation=functional.mish)), "activation mish"
    yield "inverse", lambda: of(transforms.InverseTransform(affine())), "InverseTransform"
    yield "linear", lambda: of(transforms.LULinear(4)), "LULinear"
    yield "mask", lambda: leaky(4), "own input"
    yield "ActNorm", lambda: of(transforms.ActNorm(4)), "no batch"
    base = distributions.ConditionalDiagonalNormal([4])
    yield "base", lambda: nflows.Flow(affine(), base), "ConditionalDiagonalNormal"
    yield "NCSF", lambda: zuko.flows.NCSF(4), "BoxUniform"
    yield "NAF", lambda: zuko.flows.NAF(4), "MNN"
    yield "NICE", lambda: zuko.flows.NICE(4), "GeneralCoupling"
    adjacency = torch.ones(4, 4, dtype=torch.bool).tril()
    yield "adjacency", lambda: maf_of(adjacency=adjacency), "adjacency"
    yield "Mish", lambda: zuko.flows.MAF(4, activation=nn.Mish), "activation Mish"
    glow = functools.partial(normflows.flows.MaskedAffineAutoregressive, 4, 8, context_features=2)
    yield "context", lambda: normal_flow(glow()), "context of normflows"
    yield (
        "coupling",
        lambda: normal_flow(normflows.flows.AffineCouplingBlock(normflows.nets.MLP([2, 4, 4]))),
        "Coupling",
    )
    yield "nothing", lambda: nn.Linear(2, 2), "Linear"

    def with_net(change: Callable[[Any], object], **options: Any) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            transform = affine(**options)
            change(transform.autoregressive_net)
            return of(transform)

        return make

    class Doubled(transforms.MaskedAffineAutoregressiveTransform):  # type: ignore[misc]
        def _elementwise_forward(self, inputs: Tensor, params: Tensor) -> Any:
            return super()._elementwise_forward(2 * inputs, params)

    Doubled.__name__ = "MaskedAffineAutoregressiveTransform"
    yield "method", lambda: of(Doubled(4, 8)), "overrides _elementwise_forward"
    yield "log_prob", lambda: Shifted(affine(), normal), "overrides _log_prob"
    yield "module", with_net(lambda _: None, activation=Tanh()), "overrides forward"
    yield "hook", with_net(lambda net: net.initial_layer.register_forward_hook(print)), "forward hooks"
    yield "weight_norm", with_net(lambda net: nn.utils.spectral_norm(net.final_layer)), "forward hooks"
    parametrized = nn.utils.parametrizations.spectral_norm
    yield "training", with_net(lambda net: parametrized(net.final_layer)), "call eval"
    yield "patched", with_net(lambda net: setattr(net.final_layer, "forward", torch.zeros_like)), "forward replaced"
    yield "embedding", uncopied, "cannot be copied"
    yield "permutation", lambda: normal_flow(unlike_itself()), "each other's inverse"
    yield "layer", with_net(lambda net: setattr(net, "initial_layer", nn.Linear(4, 8))), "expected a MaskedLinear"
    yield "block", with_net(lambda net: net.blocks.append(nn.Linear(8, 8))), "expected MaskedResidualBlock"
    yield "bias", with_net(lambda net: setattr(net.final_layer, "bias", None)), "with a bias"
    yield "in place", with_net(lambda _: None, activation=nn.ReLU(inplace=True)), "in place"
    yield "NaN", with_net(lambda net: net.final_layer.weight.data.fill_(torch.nan)), "not finite"
    yield "meta", lambda: nflows.Flow(affine(), distributions.StandardNormal([4])).to("meta"), "one device"
    yield "dtypes", with_net(lambda net: net.final_layer.float()), "one dtype"
    yield "features", lambda: nflows.Flow(affine(), distributions.StandardNormal([5])), "4 features, the flow 5"
    yield "divided", divided, "number of hidden features"
    yield "univariate", lambda: maf_of(univariate=Univariate), "neither affine nor"
    yield "batch", batched, "DiagNormal of vectors"
    yield "class", lambda: normflows.ClassCondFlow(normflows.distributions.DiagGaussian(4), []), "ClassCondFlow"


def uncopied() -> nn.Module:
    """An embedding net whose weight is computed, and so cannot be copied after it was used."""
    transform = transforms.MaskedAffineAutoregressiveTransform(4, 8, context_features=2)
    embedding = nn.utils.spectral_norm(nn.Linear(3, 2))
    source = nflows.Flow(transform, distributions.StandardNormal([4]), embedding)
    source.log_prob(torch.zeros(2, 4), torch.zeros(2, 3))
    return source  # type: ignore[no-any-return]


def unlike_itself() -> nn.Module:
    """A permutation whose inverse is another one."""
    layer = normflows.flows.Permute(4)
    layer.perm = layer.inv_perm.roll(1)
    return layer  # type: ignore[no-any-return]


def divided() -> nn.Module:
    """A spline whose network says by how many features its outputs are divided."""
    spline = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(4, 8, tails="linear")
    spline.autoregressive_net.hidden_features = 8
    return nflows.Flow(spline, distributions.StandardNormal([4]))


def batched() -> nn.Module:
    """A flow with a batch of bases."""
    base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(2, 4), torch.ones(2, 4))
    return zuko.flows.Flow(zuko.flows.MaskedAutoregressiveTransform(4), base)  # type: ignore[no-any-return]


class Shifted(nflows.Flow):  # type: ignore[misc]
    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        return super()._log_prob(inputs + 1, context)  # type: ignore[no-any-return]


class Tanh(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return input.tanh()


class Univariate(zuko.transforms.MonotonicAffineTransform):  # type: ignore[misc]
    pass


Univariate.__name__ = "MonotonicAffineTransform"


def maf_of(**options: Any) -> nn.Module:
    transform = zuko.flows.MaskedAutoregressiveTransform(4, **options)
    return zuko.flows.Flow(transform, zuko.flows.MAF(4).base)  # type: ignore[no-any-return]


def normal_flow(layer: nn.Module) -> nn.Module:
    base = normflows.distributions.DiagGaussian(4)
    return normflows.NormalizingFlow(base, [layer])  # type: ignore[no-any-return]


@pytest.mark.parametrize("make, message", [pytest.param(make, text, id=name) for name, make, text in refused()])
def test_what_is_refused_is_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(fastmaf.NotConvertibleError, match=message):
        fastmaf.accelerate(make())


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
        return lambda *args: forward(*args) / 2

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
