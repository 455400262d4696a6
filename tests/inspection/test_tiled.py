"""Images in tiles: the grid, maps without seams, scores and thresholds of whole images, files."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastmaf
from fastmaf.inspection.detector import Detector
from fastmaf.inspection.export.export_onnx import export_onnx
from fastmaf.inspection.fit import fit
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.inspection.tiled import TiledModel
from fastmaf.inspection.tiled_fit import fit_tiles
from fastmaf.inspection.tiles import stitched, tile_of, tiled_size
from fastmaf.inspection.workflow.calibrate import recalibrate
from fastmaf.inspection.workflow.score import score
from fastmaf.io.tensor_file import read_tensors, write_tensors
from tests.inspection.tiny import silent

RECIPE = Recipe(8, 6, "none", blocks=0, folds=3, score=ScoreSettings(), map_config=AnomalyMapConfig(factors=4))
SIDE = tiled_size(8, 2)


def images(n: int, seed: int = 0) -> torch.Tensor:
    """Every place has a brightness of its own; all change with the light."""
    rng = np.random.default_rng(seed)
    place = 128 + 60 * np.sin(np.arange(SIDE * SIDE)).reshape(SIDE, SIDE)
    pixels = place + rng.normal(0, 10, (n, 1, 1, 1)) + rng.normal(0, 3, (n, 3, SIDE, SIDE))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def fitted() -> tuple[TiledModel, np.ndarray]:
    return fit_tiles(images(40), RECIPE, 2, progress=False)


@pytest.mark.parametrize(("size", "tiles"), [(8, 1), (8, 2), (64, 5), (7, 3), (1, 4), (2, 2)])
def test_tiles_cover_every_pixel_and_maps_have_no_seams(size: int, tiles: int) -> None:
    side = tiled_size(size, tiles)
    covered = np.zeros((side, side))
    index = torch.arange(side * side).reshape(1, side, side)
    cut = [tile_of(index, i, size) for i in range(tiles**2)]
    for tile in cut:
        assert tile.shape == (1, size, size)
        covered.ravel()[tile.numpy().ravel()] += 1
    assert (covered >= 1).all()
    # tiles of one map give that map
    smooth = np.add.outer(np.arange(side), 2 * np.arange(side)).astype(np.float32)
    parts = [smooth.ravel()[tile.numpy()] for tile in cut]
    np.testing.assert_allclose(stitched(parts)[0], smooth, rtol=1e-5, atol=1e-5)
    # a step between two tiles becomes a ramp
    if tiles == 2 and size == 8:
        levels = stitched([np.full((1, size, size), float(i % 2), np.float32) for i in range(4)])[0]
        assert (np.diff(levels[0]) >= 0).all() and np.diff(levels[0]).max() <= 0.51
        assert levels[0, 0] == 0 and levels[0, -1] == 1


def test_an_image_is_as_anomalous_as_its_most_anomalous_tile(fitted: tuple[TiledModel, np.ndarray]) -> None:
    model, _ = fitted
    assert (model.size, model.tiles) == (SIDE, 2) and len(model.parts) == 4
    new = images(6, seed=1)
    prediction = model.predict(new)
    standard = [
        (part.predict(tile_of(new, i, 8)).scores - model.mean[i]) / model.deviation[i]
        for i, part in enumerate(model.parts)
    ]
    np.testing.assert_allclose(prediction.scores, np.max(standard, axis=0))
    spoiled = new.clone()
    spoiled[:, :, 9:12, 1:4] = 255  # lower left tile alone
    after = model.predict(spoiled)
    assert (after.scores > prediction.scores).all() and (after.scores > model.calibration.threshold).all()
    assert (
        after.anomaly_maps[:, 9:12, 1:4].mean(axis=(1, 2)) > 2 * after.anomaly_maps[:, :6, 8:].mean(axis=(1, 2))
    ).all()
    assert after.anomaly_maps.shape == (6, SIDE, SIDE) and after.anomaly_maps.dtype == np.float32


def test_scores_and_maps_are_the_same_without_nll(fitted: tuple[TiledModel, np.ndarray]) -> None:
    model, _ = fitted
    pixels = torch.randint(0, 256, (2, 3, model.size, model.size), dtype=torch.uint8)
    expected, found = model.predict(pixels), model.predict(pixels, nll=False)
    assert (found.scores == expected.scores).all() and (found.anomaly_maps == expected.anomaly_maps).all()
    assert np.isfinite(expected.nll).all()


def test_each_tile_has_the_model_of_a_fit_to_it(fitted: tuple[TiledModel, np.ndarray]) -> None:
    model, _ = fitted
    tile = tile_of(images(40), 3, 8)
    alone = fit(tile, replace(RECIPE, channels=3), progress=False)
    np.testing.assert_array_equal(model.parts[3].predict(tile).scores, alone.model.predict(tile).scores)
    assert model.mean[3] == pytest.approx(alone.held_out.scores.mean())


def test_the_threshold_is_one_of_images(fitted: tuple[TiledModel, np.ndarray]) -> None:
    model, held_out = fitted
    assert model.calibration.n == len(held_out) == 40 and model.calibration.how == "k-fold"
    np.testing.assert_array_equal(np.sort(held_out), model.calibration.scores)
    others = np.concatenate([model.predict(images(100, seed)).scores for seed in (2, 3, 4, 5)])
    rate = float((others > model.calibration.threshold).mean())
    assert rate < 0.15, "a rate of a tile would be that of four"


def test_groups_are_held_out_together() -> None:
    labels = [str(i // 8) for i in range(40)]
    model, _ = fit_tiles(images(40), RECIPE, 2, groups=labels, progress=False)
    assert model.calibration.folds == 3


def test_colour_decides_for_all_tiles_together() -> None:
    pixels = images(20)
    pixels[:, :, :8] = pixels[:, :1, :8]  # the upper half is grey
    model, _ = fit_tiles(pixels, RECIPE, 2, progress=False)
    assert {part.channels for part in model.parts} == {3}  # type: ignore[attr-defined]


def test_files_come_back(fitted: tuple[TiledModel, np.ndarray], tmp_path: Path) -> None:
    model, _ = fitted
    model.save(tmp_path / "m.safetensors", card=tmp_path / "README.md")
    assert "2 × 2 models" in (tmp_path / "README.md").read_text("utf-8")
    loaded, new = load_inspection(tmp_path / "m.safetensors"), images(5, seed=1)
    assert isinstance(loaded, TiledModel) and loaded.map_levels == model.map_levels
    for found, expected in zip(vars(loaded.predict(new)).values(), vars(model.predict(new)).values(), strict=True):
        np.testing.assert_array_equal(found, expected)
    tensors, metadata = read_tensors(tmp_path / "m.safetensors")
    for name, wrong in (("mean", torch.full((4,), torch.nan).double()), ("deviation", torch.zeros(4).double())):
        write_tensors({**tensors, name: wrong}, tmp_path / "bad.safetensors", metadata)
        with pytest.raises(fastmaf.CheckpointError, match="finite numbers"):
            load_inspection(tmp_path / "bad.safetensors")
    write_tensors({k: v for k, v in tensors.items() if k != "mean"}, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(fastmaf.CheckpointError, match="mean: expected torch.float64; found nothing"):
        load_inspection(tmp_path / "bad.safetensors")


def test_the_detector_and_the_commands_take_large_images(tmp_path: Path) -> None:
    from PIL import Image

    pixels = images(40).permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i:02d}.png")
    files = sorted(tmp_path.glob("*.png"))
    options: dict[str, Any] = {"size": 8, "rank": 6, "blocks": 0, "folds": 3}
    detector = Detector(tiles=2, **options).fit(files)
    assert detector.model_.size == SIDE and detector.decision_scores_.shape == (40,)
    assert detector.anomaly_map(files[:2]).shape == (2, SIDE, SIDE)
    detector.save(tmp_path / "m.safetensors")
    loaded = Detector.load(tmp_path / "m.safetensors")
    assert (loaded.size, loaded.tiles, loaded.rank) == (8, 2, 6)
    np.testing.assert_array_equal(loaded.anomaly_score(files), detector.anomaly_score(files))
    rows = io.StringIO()
    arguments = [str(tmp_path / "0?.png")]
    assert (
        score(tmp_path / "m.safetensors", arguments, overlays=tmp_path / "o", progress=False, stdout=rows, say=silent)
        == 0
    )
    assert len(rows.getvalue().splitlines()) == 11 and len(list((tmp_path / "o").iterdir())) == 10
    recalibrate(tmp_path / "m.safetensors", [str(file) for file in files], 0.05, None, progress=False, say=silent)
    assert load_inspection(tmp_path / "m.safetensors").calibration.how == "split"


def test_what_does_not_fit_is_refused(fitted: tuple[TiledModel, np.ndarray], tmp_path: Path) -> None:
    model, _ = fitted
    with pytest.raises(ValueError, match=re.escape(f"uint8 [n, 3, {SIDE}, {SIDE}]")):
        model.predict(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a square number of models"):
        replace(model, parts=model.parts[:3])
    with pytest.raises(ValueError, match="a mean and a deviation of each of 4 tiles"):
        replace(model, mean=model.mean[:2])
    with pytest.raises(ValueError, match="tiles must be at least 1; found 0"):
        Detector(tiles=0).fit(images(5).permute(0, 2, 3, 1).numpy())


def test_tiles_are_exported_as_one_graph(fitted: tuple[TiledModel, np.ndarray], tmp_path: Path) -> None:
    """``export_onnx`` compares scores, maps, NLLs and verdicts with those of fastmaf itself."""
    model, _ = fitted
    checked = [image.permute(1, 2, 0).numpy() for image in images(3, seed=1)]
    checked[2] = checked[2].copy()
    checked[2][1:4, 2:5] = 255
    report = export_onnx(model, tmp_path / "m.onnx", [*checked, np.zeros((30, 21, 3), np.uint8)])
    assert report.images == 4 and (tmp_path / "m.onnx").exists()
