"""The augmentation of a fit: the one under which held-out images are most likely, or the requested one."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import load_train, to_unit
from fastmaf.inspection import whitening as whitening_module
from fastmaf.inspection.decisions import decisions
from fastmaf.inspection.fit import fit
from fastmaf.inspection.whitening import Normals, fit_whitenings
from tests.inspection.tiny import FIXED, TINY, waves


def boards(n: int, seed: int = 0) -> Tensor:
    """Fine structure that always lies at the same place."""
    rng = np.random.default_rng(seed)
    board = np.full((16, 16, 3), 90.0)
    for _ in range(20):
        (h, w), (y, x) = rng.integers(1, 4, 2), rng.integers(0, 13, 2)
        board[y : y + h, x : x + w] = rng.uniform(30, 230, 3)
    pixels = board * (1 + 0.03 * rng.normal(size=(n, 1, 1, 1))) + rng.normal(0, 2, (n, 16, 16, 3))
    return torch.from_numpy(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("n", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_aligned_images_need_no_augmentation(n: int) -> None:
    recipe = replace(FIXED, blocks=0)
    model = fit(boards(n), recipe, progress=False).model
    tried = model.about["held_out_nll_of_augmentations"]
    assert model.about["recipe"]["augmentation"] == "none" == min(tried, key=tried.get) and len(tried) == 3
    assert tried["none"] + n < min(tried["shifts"], tried["rotations"])
    plain = fit(boards(n), replace(recipe, augmentation="none"), progress=False).model
    zero = fit(boards(n), replace(recipe, augmentation="shifts", shift_radius=0), progress=False).model
    for other in (plain, zero):
        assert other.about["held_out_nll"] == pytest.approx(model.about["held_out_nll"], rel=1e-4)
    assert plain.about["held_out_nll_of_augmentations"] == {}
    assert decisions(model)["augmentation"] == "none (shifts and rotations fit held-out images worse)"


def test_a_requested_augmentation_is_kept_with_a_warning() -> None:
    with pytest.warns(
        UserWarning, match=r"augmentation='shifts' makes held-out images less likely .*augmentation='auto'"
    ):
        model = fit(boards(20), replace(FIXED, blocks=0, augmentation="shifts"), progress=False).model
    assert model.about["recipe"]["augmentation"] == "shifts"
    assert set(model.about["held_out_nll_of_augmentations"]) == {"shifts", "none"}


def test_a_logit_that_is_asked_for_is_compared() -> None:
    recipe = replace(FIXED, blocks=0, augmentation="none", dequantize=True)
    plain = fit(waves(20), recipe, progress=False).model.about["held_out_nll"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        about = fit(waves(20), replace(recipe, logit=0.05), progress=False).model.about
    # Of the folds that decide, two of five.
    assert about["held_out_nll_without_logit"] == pytest.approx(plain, abs=60)
    worse = about["held_out_nll"] > plain
    assert any("logit=0.05" in str(warning.message) for warning in caught) == worse


@pytest.mark.parametrize("turned", [False, True])
def test_the_augmentation_makes_held_out_images_most_likely(data: Path, turned: bool) -> None:
    images = load_train(data, size=16, double=True, progress=False)
    pixels, double = images.pixels, images.double
    assert double is not None
    generator = torch.Generator().manual_seed(0)
    if turned:
        turns = torch.randint(4, (len(pixels),), generator=generator).tolist()
        pixels, double = (
            torch.stack([image.rot90(k, (1, 2)) for image, k in zip(of_size, turns, strict=True)])
            for of_size in (pixels, double)
        )
    # Many factors, so that what a whole turn takes can be explained at all.
    recipe = replace(TINY, rank=60, blocks=0, angles=4)
    fitted = fit(pixels, recipe, double=double, progress=False)
    chosen, nll_of = fitted.model.about["recipe"]["augmentation"], fitted.model.about["held_out_nll_of_augmentations"]
    assert chosen == ("rotations" if turned else "shifts") == min(nll_of, key=nll_of.get)
    first, x = fitted.out_of_fold.flows[0].transforms[0], to_unit(pixels)
    for kind in nll_of:
        whitenings = fit_whitenings(
            Normals(x, double), fitted.out_of_fold.folds, replace(recipe, augmentation=kind)
        ).folds
        nll = [
            -fastmaf.Flow(768, [whitening]).log_prob(x[fold])
            for fold, whitening in zip(fitted.out_of_fold.folds, whitenings, strict=True)
        ]
        assert float(torch.cat(nll).mean()) == pytest.approx(nll_of[kind], rel=1e-4)
        assert torch.allclose(whitenings[0].variance, first.variance, rtol=1e-3) == (kind == chosen)
    fixed = fit(pixels, replace(recipe, augmentation=chosen), double=double, progress=False)
    assert np.allclose(fixed.model.calibration.scores, fitted.model.calibration.scores, rtol=1e-4)


@pytest.mark.parametrize("shifted", [False, True])
def test_of_many_images_a_part_is_compared_first(shifted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is best on a few is compared with no augmentation on all images."""
    monkeypatch.setattr(whitening_module, "_COMPARED", 9)
    pixels = waves(30)
    if shifted:
        pixels = torch.stack([image.roll(int(k) % 3, dims=2) for k, image in enumerate(pixels)])
    model = fit(pixels, replace(FIXED, blocks=0, folds=3), progress=False).model
    about = model.about
    tried, chosen = about["held_out_nll_of_augmentations"], about["recipe"]["augmentation"]
    assert chosen == min(tried, key=tried.get) and chosen in decisions(model)["augmentation"]
    if len(tried) == 2:  # the part was wrong
        assert chosen == "none" and about["held_out_nll"] == pytest.approx(tried["none"], rel=1e-6)


def test_copies_are_made_from_the_larger_images_where_there_are_any(data: Path) -> None:
    images = load_train(data, size=16, double=True, progress=False)
    assert images.double is not None and images.double.shape == (24, 3, 32, 32)
    recipe = replace(TINY, rank=60, blocks=0, augmentation="shifts")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small, large = (
            fit(images.pixels, recipe, double=double, progress=False).model for double in (None, images.double)
        )
    assert large.about["held_out_nll"] != pytest.approx(small.about["held_out_nll"], abs=0.1)
    with pytest.raises(
        ValueError, match=r"double must be uint8 \[24, 3, 32, 32\]; found torch.uint8 \[24, 3, 16, 16\]"
    ):
        fit(images.pixels, recipe, double=images.pixels, progress=False)
