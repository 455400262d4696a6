"""Score settings, term statistics and smoothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.inspection.out_of_fold import reference_statistics
from fastmaf.inspection.scoring.float64_flow import FlowValues
from fastmaf.inspection.scoring.score import TermStatistics, smoothing, terms_of
from fastmaf.inspection.scoring.settings import ScoreSettings


def test_smoothing_keeps_a_constant_and_spreads_a_point() -> None:
    matrix = smoothing(9, 1.5)
    assert torch.allclose(matrix.sum(dim=1), torch.ones(9, dtype=torch.float64))
    assert 0 < float(matrix[4, 2]) < float(matrix[4, 3]) < float(matrix[4, 4])


def test_statistics_of_a_term_that_never_varied() -> None:
    terms = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 4.0]])
    statistics = TermStatistics.of(terms, torch.zeros(3))
    assert statistics.deviation.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="at least 2"):
        TermStatistics.of(terms[:1], torch.zeros(1))


def test_terms_of_pixels_are_lengths_over_the_colours() -> None:
    x = torch.randn(4, 3 * 5 * 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    identity = fastmaf.Flow(75, [fastmaf.GaussianWhitening(75, 0)])
    plain = ScoreSettings(source="pixels", level_power=0.0)
    lengths = terms_of(FlowValues(identity, x), plain)
    squares = terms_of(FlowValues(identity, x), ScoreSettings(source="whitened"))
    assert torch.allclose(0.5 * lengths.square(), squares.view(4, 3, 25).sum(dim=1))
    grey = fastmaf.Flow(25, [fastmaf.GaussianWhitening(25, 0)])
    assert torch.equal(terms_of(FlowValues(grey, x[:, :25]), plain), x[:, :25].abs())


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_lengths_over_a_power_of_their_mean_over_the_image(power: float) -> None:
    x = torch.randn(3, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flow, settings = fastmaf.Flow(25, [fastmaf.GaussianWhitening(25, 0)]), ScoreSettings(level_power=power)
    one, three = (terms_of(FlowValues(flow, factor * x), settings) for factor in (1.0, 3.0))
    assert torch.allclose(three, 3 ** (1 - power) * one)
    assert torch.allclose(one, x.abs() / x.abs().mean(dim=1, keepdim=True) ** power)
    assert not bool(terms_of(FlowValues(flow, 0 * x), settings).any())  # of an image that is the mean image


def test_statistics_of_training_images_on_the_scale_of_held_out_ones() -> None:
    training = TermStatistics(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0]), -7.0)
    held_out = TermStatistics(torch.tensor([2.0, 6.0, 30.0]), torch.tensor([3.0, 4.0, 8.0]), -5.0)
    scaled = training.on_scale_of(held_out)
    assert scaled.deviation.tolist() == [2.0, 4.0, 8.0] and scaled.nll == -5.0  # the median ratio is 2
    assert scaled.mean.tolist() == [3.0, 6.0, 11.0]  # the median distance is 1 deviation
    # One term of held-out images, such as one that the scored image has affected, has no effect of its own.
    other = TermStatistics(torch.tensor([2.0, 6.0, 90.0]), torch.tensor([9.0, 4.0, 8.0]), -5.0)
    assert torch.equal(training.on_scale_of(other).mean, scaled.mean)
    assert torch.equal(training.on_scale_of(other).deviation, scaled.deviation)


@pytest.mark.parametrize("reference", ["training", "held-out"])
def test_reference_statistics(reference: Any) -> None:
    x = torch.rand(30, 27, generator=torch.Generator().manual_seed(0))
    flow = fastmaf.Flow(27, [fastmaf.GaussianWhitening(27, 2).fit_(x)])
    settings = ScoreSettings(reference=reference)
    held_out = TermStatistics(torch.rand(9), 1 + torch.rand(9), 3.0)
    found = reference_statistics(flow, x, held_out, settings)
    terms = terms_of(FlowValues(flow, x), settings)
    expected = held_out if reference == "held-out" else TermStatistics.of(terms, torch.zeros(30)).on_scale_of(held_out)
    assert torch.allclose(found.mean, expected.mean) and torch.allclose(found.deviation, expected.deviation)
    nll = ScoreSettings("typicality", reference=reference)
    assert reference_statistics(flow, x, held_out, nll) is held_out


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"kind": "best"}, "kind: expected one of"),
        ({"reference": "test"}, "reference: expected one of"),
        ({"sigma": 0.0}, "sigma"),
        ({"top": 2.0}, "top"),
        ({"presmooth_sigma": -1.0}, "presmooth_sigma"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreSettings(**wrong)  # type: ignore[arg-type]


def test_a_pickle_of_an_earlier_version_has_undivided_lengths() -> None:
    settings = ScoreSettings()
    assert copy.deepcopy(settings) == settings and settings.level_power > 0
    earlier = {name: value for name, value in vars(settings).items() if name != "level_power"}
    restored = ScoreSettings.__new__(ScoreSettings)
    restored.__setstate__(earlier)
    assert restored == replace(settings, level_power=0.0)
