"""What is not converted: the message names it, with the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module

import fastmaf
from tests.convert.sources import float64, nflows, normal_flow, normflows, zuko

__all__ = ["float64"]  # a fixture
from nflows import distributions, transforms
from zuko.bayesian import BayesianModel


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
    conditional = functools.partial(affine, context_features=2)
    yield "inverse", lambda: of(transforms.InverseTransform(conditional())), "inverse transform with a context"
    yield "wrapped", lambda: nn.Sequential(nn.ReLU(), of(affine())), "it holds one: convert its module 1"
    yield "Bayesian", lambda: BayesianModel(zuko.flows.MAF(4)), r"flow\.sample_model\(\)"
    yield "distribution", lambda: zuko.mixtures.GMM(4), "GMM .* is no zuko.flows.Flow"
    yield "conditional", lambda: normflows.ConditionalNormalizingFlow(normal_flow(nn.Identity()).q0, []), "Conditional"
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

    class Borrowed(transforms.MaskedAffineAutoregressiveTransform):  # type: ignore[misc]
        def forward(self, inputs: Tensor, context: Any = None) -> Any:
            return super().forward(inputs * (1 + 1e-9), context)  # less than what a comparison of numbers finds

    Borrowed.__name__ = Borrowed.__qualname__ = "MaskedAffineAutoregressiveTransform"
    Borrowed.__module__ = transforms.MaskedAffineAutoregressiveTransform.__module__
    yield "borrowed", lambda: of(Borrowed(4, 8)), "overrides forward"
    yield "log_prob", lambda: Shifted(affine(), normal), "overrides _log_prob"
    yield "module", with_net(lambda _: None, activation=Tanh()), "overrides forward"
    yield "hook", with_net(lambda net: net.initial_layer.register_forward_hook(print)), "forward hooks"
    yield "patched", with_net(lambda net: setattr(net.final_layer, "forward", torch.zeros_like)), "forward replaced"
    yield "embedding", uncopied, "cannot be copied"
    yield "permutation", lambda: normal_flow(unlike_itself()), "each other's inverse"
    yield "raises", lambda: of(Raising(4, 8)), "cannot be converted: 'of the source'"
    yield "scales", lambda: scaled(zuko.flows.MAF(4), -0.5), "positive scales of the base; found -0.5"
    yield "zero", lambda: scaled(zuko.flows.MAF(4), 0.0), "positive scales of the base; found 0"
    yield (
        "base dtypes",
        base_of_two_dtypes,
        r"base\._1 is torch\.float32, the parameters torch\.float64; expected one dtype",
    )
    yield "noise dtype", lambda: base_of_two_dtypes(1.0), r"base\._1 is torch\.float32"
    yield "statistics dtype", statistics_of_another_dtype, r"\.running_var is torch\.float32, .* expected one dtype"
    yield "norm dtype", with_net(round_statistics, use_batch_norm=True), r"running_var is torch\.float32"
    yield "constant", constant, "has the constant"
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
    """An embedding net that keeps a result, which cannot be copied."""
    transform = transforms.MaskedAffineAutoregressiveTransform(4, 8, context_features=2)
    embedding = nn.Linear(3, 2)
    embedding.last = embedding(torch.zeros(2, 3))  # type: ignore[assignment]
    return nflows.Flow(transform, distributions.StandardNormal([4]), embedding)  # type: ignore[no-any-return]


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


def scaled(flow: Any, scale: float) -> nn.Module:
    """A flow of zuko whose base has this scale in one dimension, as training may leave it."""
    base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(4), torch.ones(4))
    with torch.no_grad():
        base().base_dist.scale[2] = scale
    return zuko.flows.Flow(flow.transform.transforms, base)  # type: ignore[no-any-return]


def base_of_two_dtypes(value: float = 0.3) -> nn.Module:
    """A base whose scale is float32 in a flow of float64; of a mean like that the noise would be float32, too."""
    normal, scale = zuko.distributions.DiagNormal, torch.full((4,), value, dtype=torch.float32)
    base = zuko.lazy.UnconditionalDistribution(normal, torch.zeros(4), scale, buffer=True)
    return zuko.flows.Flow(zuko.flows.MAF(4).transform.transforms, base)  # type: ignore[no-any-return]


def round_statistics(net: Any) -> None:
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_var = torch.full((layer.num_features,), 0.3, dtype=torch.float32)


def statistics_of_another_dtype() -> nn.Module:
    """A normalisation that computes its scale in float32, in a flow of float64."""
    norm = transforms.BatchNorm(4)
    norm.running_var = torch.full((4,), 0.3, dtype=torch.float32)
    return nflows.Flow(norm, distributions.StandardNormal([4]))  # type: ignore[no-any-return]


def constant() -> nn.Module:
    """A base whose density does not integrate to one."""
    flow = nflows.Flow(transforms.MaskedAffineAutoregressiveTransform(4, 8), distributions.StandardNormal([4]))
    flow._distribution._log_z.mul_(1.01)
    return flow  # type: ignore[no-any-return]


class Raising(transforms.MaskedAffineAutoregressiveTransform):  # type: ignore[misc]
    """A transform with an attribute that raises."""

    @property
    def _epsilon(self) -> float:
        raise KeyError("of the source")

    @_epsilon.setter
    def _epsilon(self, value: float) -> None:
        pass


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


@pytest.mark.parametrize("make, message", [pytest.param(make, text, id=name) for name, make, text in refused()])
def test_what_is_refused_is_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(fastmaf.NotConvertibleError, match=message):
        fastmaf.accelerate(make())


def test_a_state_dict_is_no_flow() -> None:
    with pytest.raises(fastmaf.NotConvertibleError, match="OrderedDict .*; load a state dict into the flow"):
        fastmaf.accelerate(zuko.flows.MAF(4).state_dict())  # type: ignore[arg-type]


def test_hooks_for_all_modules() -> None:
    source = nflows.MaskedAutoregressiveFlow(4, 8, 1, 1)
    for register in (module.register_module_forward_hook, module.register_module_forward_pre_hook):
        handle = register(lambda *_: None)
        with pytest.raises(fastmaf.NotConvertibleError, match="for all modules"):
            fastmaf.accelerate(source)
        handle.remove()
    fastmaf.accelerate(source)


REPLACED = [
    (lambda: nflows.MaskedAutoregressiveFlow(4, 8, 1, 1), transforms.made.MaskedLinear, "forward"),
    (lambda: nflows.MaskedAutoregressiveFlow(4, 8, 1, 1), nflows.Flow, "_log_prob"),
    (lambda: nflows.MaskedAutoregressiveFlow(4, 8, 1, 1), distributions.Distribution, "sample"),
    (lambda: zuko.flows.MAF(4), zuko.distributions.DiagNormal, "__init__"),
    (lambda: zuko.flows.MAF(4), zuko.transforms.MonotonicAffineTransform, "_call"),
    (lambda: normal_flow(normflows.flows.MaskedAffineAutoregressive(4, 8)), normflows.NormalizingFlow, "sample"),
    (lambda: normal_flow(normflows.flows.Permute(4)), normflows.flows.Permute, "forward"),
]


@pytest.mark.parametrize("make, cls, name", REPLACED)
@pytest.mark.parametrize("wrapped", [False, True])
def test_classes_that_are_changed_while_the_program_runs(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], cls: type, name: str, wrapped: bool
) -> None:
    """Even where the change is less than what a comparison of numbers finds."""
    source, method = make(), vars(cls)[name]
    fastmaf.accelerate(source)

    def other(self: Any, *args: Any, **options: Any) -> Any:
        return method(self, *args, **options)

    monkeypatch.setattr(cls, name, torch.no_grad()(functools.wraps(method)(other)) if wrapped else other)
    with pytest.raises(fastmaf.NotConvertibleError, match=rf"{cls.__name__}\.{name} was replaced"):
        fastmaf.accelerate(source)


def test_a_source_that_cannot_be_called_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = nflows.Flow(transforms.MaskedAffineAutoregressiveTransform(4, 8), distributions.StandardNormal([4]))

    def out_of_domain(*_: Any) -> Any:
        raise transforms.InputOutsideDomain

    monkeypatch.setattr(transforms.autoregressive.F, "softplus", out_of_domain)
    with pytest.raises(fastmaf.NotConvertibleError, match="cannot be called at random points: InputOutsideDomain"):
        fastmaf.accelerate(source)
