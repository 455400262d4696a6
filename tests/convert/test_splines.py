"""Spline flows of nflows, zuko and normflows, as those libraries compute them and after their conversion."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmaf
from tests.convert.sources import FEATURES, WIDTHS, close, float64, nflows, normflows, seeded, trained, zuko

__all__ = ["float64"]  # a fixture
from nflows import distributions, transforms


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


def test_splines_without_tails_in_a_network_with_a_smooth_activation_and_a_context() -> None:
    """They are compared with their source within their domain."""
    of = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
    spline = of(4, 8, context_features=2, num_bins=3, activation=torch.tanh)
    source = nflows.Flow(spline, distributions.StandardNormal([4]))
    x, c = torch.rand(9, 4), torch.randn(9, 2)
    trained(source, lambda: -source.log_prob(x, c).mean())
    close(fastmaf.accelerate(source).log_prob(x, c), source.log_prob(x, c))  # type: ignore[operator]


def test_inverses_of_splines_without_tails() -> None:
    spline = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(4, 8, num_bins=3)
    source = nflows.Flow(transforms.InverseTransform(spline), distributions.StandardNormal([4]))
    x = torch.rand(9, 4)
    trained(source, lambda: -source.log_prob(x).mean())
    close(fastmaf.accelerate(source).log_prob(x), source.log_prob(x))  # type: ignore[operator]


def test_reversed_layers_of_normflows() -> None:
    """Splines, permutations and scales within Reverse, which may be nested."""
    flows, back = normflows.flows, normflows.flows.Reverse
    layers = [
        back(flows.AutoregressiveRationalQuadraticSpline(5, 1, 8, num_bins=4, init_identity=False)),
        back(flows.Permute(5)),
        back(flows.AffineConstFlow((5,))),
        back(back(flows.MaskedAffineAutoregressive(5, 8))),
        back(flows.Permute(5, "swap")),
    ]
    source = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(5), layers)
    x = torch.randn(9, 5)
    trained(source, lambda: source.forward_kld(x))
    flow = fastmaf.accelerate(source)
    close(flow.log_prob(x), source.log_prob(x))  # type: ignore[operator]
    for found, expected in zip(*(seeded(lambda f=f: f.sample(3)) for f in (flow, source)), strict=True):
        close(found, expected)
