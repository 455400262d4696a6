"""Sources whose parameters are computed: by weight normalisation, spectral normalisation, pruning, parametrizations."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastmaf
from tests.convert.sources import close, float64, nflows, normflows, seeded, trained, zuko

__all__ = ["float64"]  # a fixture
from nflows import distributions, transforms


class Scaled(nn.Module):
    """A parametrization of a user's class."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight.tanh()


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm by hooks": old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm by hooks": nn.utils.spectral_norm,
    "own class": lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
    "bias": lambda layer: parametrize.register_parametrization(layer, "bias", Scaled()),
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", amount=0.3),
    "both": lambda layer: (parametrizations.weight_norm(layer), parametrizations.spectral_norm(layer)),
    "hooks of both": lambda layer: (old_weight_norm(layer), prune.l1_unstructured(layer, "bias", amount=1)),
}


def changed(source: nn.Module, way: str) -> Any:
    """Returns a source whose linear layers have computed weights; what is hidden by the masks counts in the norms."""
    torch.manual_seed(3)
    for layer in [module for module in source.modules() if isinstance(module, nn.Linear)]:
        WAYS[way](layer)
    return source


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("residual", [True, False])
def test_nflows(way: str, residual: bool) -> None:
    layers: list[nn.Module] = []
    for _ in range(2):
        options = {"use_residual_blocks": residual, "use_batch_norm": residual, "context_features": 3}
        layers += [transforms.MaskedAffineAutoregressiveTransform(7, 11, **options), transforms.ReversePermutation(7)]
    source = nflows.Flow(
        transforms.CompositeTransform(layers), distributions.StandardNormal([7]), nn.Sequential(nn.Linear(2, 3))
    )
    x, c = torch.randn(9, 7), torch.randn(9, 2)
    trained(changed(source, way), lambda: -source.log_prob(x, c).mean())
    flow = fastmaf.accelerate(source)
    close(flow.log_prob(x, c), source.log_prob(x, c))  # type: ignore[operator]
    close(seeded(lambda: flow.sample(3, c)), seeded(lambda: source.sample(3, c)))  # type: ignore[operator]
    assert max(one.worst for one in flow.parity_report(x, c) if one.dtype == torch.float64) < 1e-9


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU])
def test_zuko(way: str, activation: type[nn.Module]) -> None:
    source = zuko.flows.MAF(5, 2, transforms=2, hidden_features=(9, 9), activation=activation)
    x, c = torch.randn(9, 5), torch.randn(9, 2)
    trained(changed(source, way), lambda: -source(c).log_prob(x).mean())
    flow = fastmaf.accelerate(source)
    close(flow(c).log_prob(x), source(c).log_prob(x))
    close(seeded(lambda: flow(c).sample((3,))), seeded(lambda: source(c).sample((3,))))


@pytest.mark.parametrize("way", WAYS)
def test_normflows(way: str) -> None:
    layer = normflows.flows.MaskedAffineAutoregressive(5, 9)
    spline = normflows.flows.AutoregressiveRationalQuadraticSpline(5, 1, 8, num_bins=4, init_identity=False)
    source = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(5), [layer, spline])
    x = torch.randn(9, 5)
    trained(changed(source, way), lambda: source.forward_kld(x))
    flow = fastmaf.accelerate(source)
    close(flow.log_prob(x), source.log_prob(x))  # type: ignore[operator]


@pytest.mark.parametrize("way", ["spectral_norm", "spectral_norm by hooks"])
def test_a_source_in_training_is_converted_as_in_evaluation_and_left_as_it_was(way: str) -> None:
    source = changed(zuko.flows.MAF(4, transforms=1, hidden_features=(8,)), way).train()
    source().log_prob(torch.randn(3, 4))
    before = copy.deepcopy(source.state_dict())
    flow, x = fastmaf.accelerate(source), torch.randn(5, 4)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert source.training and flow.training
    close(flow().log_prob(x), source.eval()().log_prob(x))


def test_hooks_after_a_step_of_training() -> None:
    """The weight that the last call computed is not the present one."""
    source = changed(zuko.flows.MAF(4, transforms=1, hidden_features=(8,)), "weight_norm by hooks")
    source().log_prob(torch.randn(3, 4)).sum().backward()
    torch.optim.SGD(source.parameters(), 0.1).step()
    x = torch.randn(5, 4)
    close(fastmaf.accelerate(source)().log_prob(x), source().log_prob(x))


def test_a_weight_without_a_norm_is_refused() -> None:
    source = changed(zuko.flows.MAF(4, transforms=1, hidden_features=(8,)), "weight_norm")
    with torch.no_grad():
        source.transform.transforms[0].hyper[0].parametrizations.weight.original1[0] = 0
    with pytest.raises(fastmaf.NotConvertibleError, match="weight contains numbers that are not finite"):
        fastmaf.accelerate(source)
