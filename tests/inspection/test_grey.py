"""Grey images: fitted as one channel; colour images are converted to grey for such a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastmaf
from fastmaf.images.dataset import image_shape, is_grey, load_train, to_grey, to_unit
from fastmaf.inspection.export.export_onnx import export_onnx
from fastmaf.inspection.fit import fit
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.workflow.fit import fit as fit_folder
from tests.inspection.tiny import FIXED, TINY, silent, waves


def grey_waves(n: int, seed: int = 0) -> torch.Tensor:
    return waves(n, seed)[:, :1].expand(-1, 3, -1, -1).contiguous()


def test_grey_is_that_of_pillow() -> None:
    colours = torch.randint(0, 256, (1, 3, 50, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = np.asarray(Image.fromarray(colours[0].permute(1, 2, 0).contiguous().numpy()).convert("L"))
    assert np.array_equal(to_grey(colours)[0, 0].numpy(), expected)
    every = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert torch.equal(to_grey(every), every[:, :1]) and is_grey(every) and not is_grey(colours)
    assert torch.equal(to_unit(every, 1), torch.arange(256)[None] / 255)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 128])
def test_the_number_of_values_tells_the_channels(size: int) -> None:
    assert image_shape(size**2) == (1, size) and image_shape(3 * size**2) == (3, size)
    with pytest.raises(ValueError, match=f"square image; found {2 * size**2}"):
        image_shape(2 * size**2)
    with pytest.raises(ValueError, match="found 0"):
        image_shape(0)


@pytest.mark.parametrize("options", [{"blocks": 1, "steps": 5}, {"blocks": 0, "score": None, "map_config": None}])
def test_grey_images_are_fitted_as_one_channel(options: dict[str, object], tmp_path: Path) -> None:
    recipe = replace(FIXED, folds=3, **options)
    if recipe.blocks:
        with pytest.warns(UserWarning, match="blocks=1"):
            model = fit(grey_waves(24), recipe, progress=False).model
    else:
        model = fit(grey_waves(24), recipe, progress=False).model
    assert (model.channels, model.size, model.flow.features) == (1, 16, 256)
    assert model.about["recipe"]["channels"] == 1 and model.about["asked"]["channels"] == "auto"
    new = grey_waves(5, seed=1)
    prediction = model.predict(new)
    assert prediction.anomaly_maps.shape == (5, 16, 16) and np.isfinite(prediction.scores).all()
    coloured = waves(5, seed=1)
    as_grey = to_grey(coloured).expand(-1, 3, -1, -1).contiguous()
    assert np.array_equal(model.scores(coloured), model.scores(as_grey))
    model.save(tmp_path / "m.safetensors", card=tmp_path / "card.md")
    assert np.array_equal(load_inspection(tmp_path / "m.safetensors").scores(new), prediction.scores)
    assert "grey, resized to 16" in (tmp_path / "card.md").read_text("utf-8")


def test_the_exported_graph_converts_to_grey(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = fit(grey_waves(24), replace(FIXED, folds=3, blocks=0), progress=False).model
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 50, 3), dtype=np.uint8), *waves(3, 2).permute(0, 2, 3, 1).numpy()]
    report = export_onnx(model, tmp_path / "m.onnx", images)
    assert report.images == 4 and report.score < 1e-3


def test_one_channel_gives_the_density_of_one_channel() -> None:
    """As colour, three equal channels count their information three times, and their noise not at all."""
    recipe = replace(FIXED, folds=3, blocks=0, augmentation="none")
    grey = fit(grey_waves(30), recipe, progress=False)
    colour = fit(grey_waves(30), replace(recipe, channels=3), progress=False).model
    assert colour.flow.features == 768 and colour.about["held_out_nll"] < 3 * grey.model.about["held_out_nll"] / 2
    x = to_unit(grey_waves(30), 1)
    fold, flow = grey.out_of_fold.folds[0], grey.out_of_fold.flows[0]
    nll = float(-flow.log_prob(x[fold]).mean())
    assert nll == pytest.approx(grey.model.about["held_out_nll_of_folds"][0], rel=1e-4)
    with pytest.raises(ValueError, match="channels must be 'auto', 1 or 3; found 2"):
        Recipe(channels=2)


def test_a_folder_of_grey_files(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    for i, image in enumerate(grey_waves(9)):
        Image.fromarray(image[0].numpy()).save(tmp_path / "good" / f"{i}.png")
    result = fit_folder(tmp_path / "good", tmp_path / "run", replace(TINY, blocks=0), progress=False, say=silent)
    assert result.describe().startswith("9 good images at 16 x 16 pixels, grey: one channel; held-out NLL")
    detector = fastmaf.Detector.load(tmp_path / "run" / "model.safetensors")
    files = sorted((tmp_path / "good").glob("*.png"))
    assert detector.n_features_in_ == 256 and detector.anomaly_map(files[:2]).shape == (2, 16, 16)
    images = load_train(tmp_path / "good", size=16, progress=False)
    assert np.array_equal(detector.anomaly_score(files), load_inspection(tmp_path / "run").scores(images.pixels))
