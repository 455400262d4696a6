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
