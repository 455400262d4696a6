"""Fitting texture models: levels, held-out results."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from fastmaf.inspection.texture import density
from fastmaf.inspection.texture.candidate import TextureCandidate
from fastmaf.inspection.texture.features import LEVELS
from fastmaf.inspection.texture.fit import fit_texture, usable_levels
from fastmaf.transforms import fallback
from tests.inspection.texture.conftest import grain


def test_a_level_is_used_where_every_fold_leaves_two_images_of_it() -> None:
    fold_of = np.array([0, 0, 0, 1, 1, 1])
    every, half, one_fold = np.arange(6).repeat(9), np.array([0, 1, 3, 4]), np.array([0, 1, 2, 3])
    assert usable_levels([every, every, half], fold_of) == 3
    assert usable_levels([every, one_fold, every], fold_of) == 1  # without the first fold, one image is left
    assert usable_levels([every, np.array([0, 3])], fold_of) == 1
    assert usable_levels([every, np.array([], dtype=int)], fold_of) == 1


def test_a_group_may_hold_all_large_images() -> None:
    pixels, large, small = grain(16, 3), (64, 64), (24, 40)
    shapes = [large] * 9 + [small] * 7
    folds = [np.arange(9), np.arange(9, 16)]
    candidate = fit_texture(pixels, folds, shapes=shapes)
    assert len(candidate.fitted.flows) == 1 and np.isfinite(candidate.good.scores).all()
    spread = [np.array([0, 2, 4, 6, 8, 10, 12, 14]), np.array([1, 3, 5, 7, 9, 11, 13, 15])]
    assert 1 < len(fit_texture(pixels, spread, shapes=shapes).fitted.flows) < LEVELS


def test_the_first_fold_may_hold_no_large_image() -> None:
    pixels = grain(18, 4)
    shapes = [(24, 40)] * 6 + [(64, 64)] * 12
    model = fit_texture(pixels, [np.arange(6), np.arange(6, 12), np.arange(12, 18)], shapes=shapes).fitted
    assert len(model.flows) > 1
    figures = model.about["texture_levels"]["level 1"]
    assert np.isfinite([figures["held_out_nll"], figures["held_out_nll_of_whitening"]]).all()


def test_held_out_results_of_the_good_images_are_not_computed_twice(
    candidate: TextureCandidate, texture: torch.Tensor
) -> None:
    again = candidate.held_out([texture.clone(), grain(len(texture), 5)])
    np.testing.assert_array_equal(again.scores[0], candidate.good.scores[0])
    index, some = candidate.subset(10, 0)
    few = some.held_out([texture[torch.from_numpy(index)]])
    np.testing.assert_array_equal(few.scores[0], candidate.good.scores[0, index])
    changed = texture[torch.from_numpy(index)].clone()
    changed[0, :, :4, :4] = 0
    computed = some.held_out([changed])
    np.testing.assert_allclose(computed.scores[0, 1:], few.scores[0, 1:])
    np.testing.assert_allclose(computed.maps[0, 1:], few.maps[0, 1:], rtol=1e-5, atol=1e-6)
    assert computed.scores[0, 0] != few.scores[0, 0]


def test_its_blocks_are_trained_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_given", False)
    monkeypatch.setattr(density, "_STEPS", 4)
    rows, contexts = torch.randn(200, 3), torch.randn(200, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density.fit_blocks(rows, contexts, density.fit_whitening(rows))
