"""The blocks of a fit: dropped if held-out images are no more likely with them, unless they are requested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import to_unit
from fastmaf.inspection import blocks as blocks_module
from fastmaf.inspection.decisions import decisions
from fastmaf.inspection.detector import Detector
from fastmaf.inspection.fit import fit
from fastmaf.inspection.recipe import Recipe
from tests.inspection.tiny import FIXED, waves


def noise_of_neighbours(n: int) -> Tensor:
    """Pixels that follow their neighbours, which few factors cannot explain and blocks can."""
    rng = np.random.default_rng(0)
    white = rng.normal(size=(n, 3, 18, 18))
    field = sum(white[:, :, i : i + 16, j : j + 16] for i in range(3) for j in range(3))
    return torch.from_numpy(np.clip(128 + 8 * field, 0, 255).astype(np.uint8))


@pytest.mark.slow
def test_blocks_that_worsen_the_held_out_nll_are_left_out() -> None:
    # The difference is 900 to 2,100 over seeds, as blocks fit few images anyhow; of this seed it is far from the bound.
    model = fit(waves(20), replace(FIXED, seed=4), progress=False).model
    about = model.about
    assert about["held_out_nll_with_blocks"] > about["held_out_nll_of_whitening"] + 1000
    assert about["held_out_nll"] == about["held_out_nll_of_whitening"] < -1900
    assert [type(step) for step in model.flow.transforms] == [fastmaf.GaussianWhitening]
    assert about["recipe"]["blocks"] == 0 and about["asked"]["blocks"] == "auto"
    new = float(-model.flow.log_prob(to_unit(waves(20, 1))).mean())
    assert new == pytest.approx(about["held_out_nll"], abs=60)
    line = decisions(model, explain=True)["blocks"]
    for nll in (about["held_out_nll_with_blocks"], about["held_out_nll"]):
        assert f"{nll:,.0f}" in line
    assert decisions(model)["blocks"] == "none (held-out images are no more likely with local blocks)"


def test_a_linear_block_is_trained_although_it_has_empty_weights() -> None:
    recipe = Recipe(16, blocks=1, hidden=0, steps=40)
    noise = torch.randn(20, recipe.features, generator=torch.Generator().manual_seed(0))
    z = noise + noise.roll(1, dims=1)  # neighbours share half of their variance
    flow = fastmaf.Flow(recipe.features, blocks_module.fit_blocks(z, recipe))
    with torch.no_grad():
        assert float(flow.log_prob(z).mean()) > float(fastmaf.Flow(recipe.features, []).log_prob(z).mean())


@pytest.mark.slow
def test_blocks_that_help_are_kept() -> None:
    recipe = replace(FIXED, rank=5, steps=60, folds=3)
    model = fit(noise_of_neighbours(60), recipe, progress=False).model
    about = model.about
    assert about["held_out_nll"] == about["held_out_nll_with_blocks"] < about["held_out_nll_of_whitening"]
    assert len(model.flow.transforms) == 3 and about["recipe"]["blocks"] == 2
    assert decisions(model)["blocks"] == "2 local blocks (held-out images are more likely with them)"


@pytest.mark.slow
def test_blocks_that_are_asked_for_are_kept_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"blocks=2 do not make .*blocks='auto' drops them"):
        model = fit(waves(20), replace(FIXED, blocks=2), progress=False).model
    assert len(model.flow.transforms) == 3
    assert (
        model.about["held_out_nll"]
        == model.about["held_out_nll_with_blocks"]
        > model.about["held_out_nll_of_whitening"]
    )


def test_nan_is_no_improvement(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(z: Tensor, recipe: Recipe, *_: object) -> list[fastmaf.Transform]:
        block = fastmaf.LocalAutoregressive((3, 16, 16), patch=2, generator=torch.Generator())
        torch.nn.init.constant_(block.second.bias, float("nan"))  # type: ignore[arg-type]
        return [block]

    monkeypatch.setattr(blocks_module, "fit_blocks", broken)
    model = fit(waves(6), FIXED, progress=False).model
    assert len(model.flow.transforms) == 1 and np.isfinite(model.calibration.scores).all()


@pytest.mark.slow
def test_a_detector_leaves_out_as_a_fit_does_and_loads_as_it_was_asked(tmp_path: Path) -> None:
    images = waves(20).permute(0, 2, 3, 1).numpy()
    detector = Detector(size=16).fit(images)
    assert len(detector.model_.flow.transforms) == 1  # type: ignore[union-attr]
    detector.save(tmp_path / "d.safetensors")
    loaded = Detector.load(tmp_path / "d.safetensors")
    assert loaded.get_params() == detector.get_params() and loaded.blocks == "auto"


@pytest.mark.parametrize("blocks", ["two", -1])
def test_blocks_that_are_no_number_are_refused(blocks: object) -> None:
    with pytest.raises(ValueError, match=f"blocks must be 'auto' or at least 0; found {blocks!r}"):
        replace(FIXED, blocks=blocks)
