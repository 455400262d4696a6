"""The settings of a fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fastmaf
from tests.inspection.tiny import TINY


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logit": 0.5}, r"logit must lie in \(0, 0.5\); found 0.5"),
        ({"logit": 0.0}, r"logit must lie in \(0, 0.5\); found 0.0"),
        ({"logit": 1e-3, "dequantize": True}, r"logit must lie in \(0.00195312, 0.5\); found 0.001"),
        ({"angles": 0}, "angles must be at least 1; found 0"),
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
