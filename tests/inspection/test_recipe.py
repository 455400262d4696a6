"""The settings of a fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.inspection.fit import fit
from fastmaf.inspection.recipe import Recipe
from tests.inspection.tiny import TINY


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logit": 0.5}, r"logit must lie in \(0, 0.5\); found 0.5"),
        ({"logit": 0.0}, r"logit must lie in \(0, 0.5\); found 0.0"),
        ({"logit": 1e-3, "dequantize": True}, r"logit must lie in \(0.00195312, 0.5\); found 0.001"),
        ({"angles": 0}, "angles must be at least 1; found 0"),
        ({"rank": -1}, "rank must be 'auto' or at least 0; found -1"),
        ({"rank": "all"}, "rank must be 'auto' or at least 0; found 'all'"),
        ({"augmentation": "both"}, "augmentation must be 'auto' or one of 'none', 'shifts', 'rotations'; found 'both'"),
    ],
)
def test_a_recipe_that_cannot_be_fitted_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong)


def test_the_smallest_logit_takes_bins_beyond_black_and_white() -> None:
    recipe = replace(TINY, logit=1 / 512 + 1e-6, dequantize=True)
    assert recipe.logit is not None
    ends = torch.tensor([[-0.5 / 255, 1 + 0.5 / 255]])
    assert bool(torch.isfinite(fastmaf.Logit(2, recipe.logit)(ends)[0]).all())


def test_as_many_factors_as_memory_allows_and_more_of_turned_images() -> None:
    shifts, turned = (Recipe(64, augmentation=augmentation) for augmentation in ("shifts", "rotations"))
    assert (shifts.factors, turned.factors, replace(turned, rank=30).factors) == (600, 800, 30)
    assert replace(turned, size=16).factors == 768 and replace(turned, size=8, channels=1).factors == 64
    assert [replace(turned, size=size).factors for size in (96, 128, 256)] == [606, 400, 400]


def test_the_rank_of_a_fit_is_recorded() -> None:
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    recipe = replace(TINY, rank="auto", augmentation="rotations", blocks=0)
    about = fit(pixels, recipe, progress=False).model.about
    assert about["recipe"]["rank"] == 768 and about["asked"]["rank"] == "auto"
