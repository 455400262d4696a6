"""Models of several sizes, and the choice among them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmaf.images.dataset import load_train
from fastmaf.images.reduce import reduced
from fastmaf.inspection import sizes as module
from fastmaf.inspection.combined import CombinedModel
from fastmaf.inspection.sizes import fit_sizes, sizes_for
from tests.inspection.tiny import TINY

SMALL = replace(TINY, size=8, rank=6, blocks=0)


@pytest.fixture(scope="module")
def pixels(data: Path) -> torch.Tensor:
    return load_train(data, size=16, progress=False).pixels


def test_sizes_are_those_that_images_hold_and_the_budget_allows() -> None:
    assert sizes_for(40) == sizes_for(64) == sizes_for(127) == (64,)
    assert sizes_for(128) == sizes_for(1000) == (64, 128)
    assert sizes_for(1000, budget=300) == (64, 128, 256) and sizes_for(200, budget=300) == (64, 128)


def test_every_size_is_fitted_to_the_images_reduced(pixels: torch.Tensor) -> None:
    result = fit_sizes(pixels, (8, 16), SMALL, progress=False)
    assert [candidate.size for candidate in result.candidates] == [8, 16] and result.skipped == ()
    assert set(result.seconds) == {"8 pixels", "16 pixels", "choice"}
    assert result.model.size == 16 and set(result.model.about["drawn_auroc_of_candidates"]) >= {"8 pixels", "16 pixels"}
    small, large = (candidate.model() for candidate in result.candidates)
    assert large.about["recipe"]["augmentation"] == small.about["recipe"]["augmentation"]
    assert result.density is small and result.log is result.candidates[0].fitted.log
    held = result.candidates[0].held_out([reduced(pixels, 8)]).scores[0]
    np.testing.assert_array_equal(np.sort(held), small.calibration.scores)


def test_without_time_only_the_smallest_is_fitted_and_takes_the_images_reduced(pixels: torch.Tensor) -> None:
    result = fit_sizes(pixels, (8, 16), SMALL, budget=0, progress=False)
    assert result.skipped == (16,) and result.model.about["skipped_sizes"] == [16]
    assert isinstance(result.model, CombinedModel) and len(result.model.parts) == 1 and result.model.size == 16
    alone, together = (m.predict(p) for m, p in ((result.density, reduced(pixels, 8)), (result.model, pixels)))
    assert np.corrcoef(alone.scores, together.scores)[0, 1] > 0.999999  # the same up to their unit


def test_sizes_must_ascend_to_the_images(pixels: torch.Tensor) -> None:
    for sizes in ((16, 8), (8, 8, 16), (8,), ()):
        with pytest.raises(ValueError, match="sizes must ascend to 16, the side of the images"):
            fit_sizes(pixels, sizes, SMALL)


def test_of_many_images_some_are_compared_and_all_calibrate(
    pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IMAGES", 12)
    model = fit_sizes(pixels, (8, 16), SMALL, budget=0, progress=False).model
    assert model.calibration.n == len(pixels) and set(model.about["drawn_auroc_of_candidates"]) == {"8 pixels"}
