"""The map of where an image is anomalous: what it is made of, its unit, and how its constants are chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastmaf
from fastmaf.inspection.scoring.float64_flow import FlowValues
from fastmaf.inspection.scoring.score import anomaly_maps, residuals_of, smoothing
from fastmaf.inspection.scoring.settings import AnomalyMapConfig

SIZE, D = 8, 192


def residuals(flow: fastmaf.Flow, x: torch.Tensor, config: AnomalyMapConfig) -> torch.Tensor:
    return residuals_of(FlowValues(flow, x), config)


def whitening(rank: int = 12, dtype: torch.dtype = torch.float64) -> fastmaf.GaussianWhitening:
    """Of data with a few strong factors and noise that differs from pixel to pixel."""
    generator = torch.Generator().manual_seed(0)
    factors = 3 * torch.randn(6, D, generator=generator, dtype=torch.float64)
    noise = 0.5 + torch.rand(D, generator=generator, dtype=torch.float64)
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64) @ factors
    x += noise * torch.randn(60, D, generator=generator, dtype=torch.float64)
    return fastmaf.GaussianWhitening(D, rank, dtype=dtype).fit_(x.to(dtype), folds=3)


def images(n: int = 5) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("factors", [0, 3, 12, 500])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_residual_is_the_whitening_by_the_largest_factors_alone(factors: int, power: float) -> None:
    step, x = whitening(), images()
    kept = min(factors, step.rank)
    smaller = fastmaf.GaussianWhitening(D, kept, dtype=torch.float64)
    smaller.mean.copy_(step.mean)
    smaller.scale.copy_(step.scale)
    smaller.factors.copy_(step.factors[:, :kept])
    smaller.variance.copy_(step.variance[:kept])
    assert bool((step.variance.diff() <= 0).all()), "the first factors are the largest"
    result = residuals(fastmaf.Flow(D, [step]), x, AnomalyMapConfig(factors, power))
    assert torch.allclose(result, smaller(x)[0] * step.scale**power, rtol=1e-9, atol=1e-9)


def test_a_residual_of_float32_is_that_of_float64() -> None:
    exact = residuals(fastmaf.Flow(D, [whitening()]), images(), AnomalyMapConfig(6, 0.5))
    result = residuals(fastmaf.Flow(D, [whitening().float()]), images().float(), AnomalyMapConfig(6, 0.5))
    assert (result - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_what_comes_before_the_whitening_is_applied_and_what_comes_after_is_not() -> None:
    step, x = whitening(), torch.rand(4, D, dtype=torch.float64)
    logit = fastmaf.Logit(D, 0.1)
    flow = fastmaf.Flow(D, [logit, step, fastmaf.Permutation(torch.arange(D).flip(0))])
    expected = residuals(fastmaf.Flow(D, [step]), logit(x)[0], AnomalyMapConfig(4))
    assert torch.equal(residuals(flow, x, AnomalyMapConfig(4)), expected)


def test_a_map_is_the_root_of_smoothed_squares_over_the_colours_in_its_unit() -> None:
    residual, config = images(), AnomalyMapConfig(sigma=1.3, rms=0.7)
    matrix = smoothing(SIZE, 1.3)
    for image, result in zip(residual, anomaly_maps(residual, config), strict=True):
        squares = sum(plane**2 for plane in image.view(3, SIZE, SIZE))
        assert torch.allclose(result * 0.7, (matrix @ squares @ matrix.T).sqrt())


def test_a_spot_is_highest_where_it_lies() -> None:
    step, x = whitening(), images(1).zero_() + whitening().mean
    x.view(3, SIZE, SIZE)[:, 5, 2] += 40 * step.scale.view(3, SIZE, SIZE)[:, 5, 2]
    result = anomaly_maps(residuals(fastmaf.Flow(D, [step]), x, AnomalyMapConfig(6)), AnomalyMapConfig())[0]
    assert divmod(int(result.argmax()), SIZE) == (5, 2)


def test_a_map_of_an_image_that_is_explained_is_zero_and_finite() -> None:
    assert torch.equal(anomaly_maps(torch.zeros(2, D), AnomalyMapConfig()), torch.zeros(2, SIZE, SIZE))


@pytest.mark.parametrize(
    ("name", "value"), [("factors", -1), ("power", -0.1), ("power", 1.5), ("sigma", 0.0), ("rms", float("nan"))]
)
def test_wrong_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        replace(AnomalyMapConfig(), **{name: value})
