"""Objects whose images are not square: their models keep the aspect ratio."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import fastmaf
from fastmaf.images.reduce import reduced
from fastmaf.inspection.aspect import aspect_of, fitted_into, shape_for, usable_side
from fastmaf.inspection.augmentation import rotations, shifts
from fastmaf.inspection.export.export_onnx import export_onnx
from fastmaf.inspection.fit import Fitted, fit
from fastmaf.inspection.map_shapes import brought_to, squared
from fastmaf.inspection.model import InspectionModel, load_inspection
from fastmaf.inspection.pixel_candidate import PixelCandidate
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.score import smoothed
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.inspection.sizes import fit_sizes
from fastmaf.inspection.synthetic_defects.draw import KINDS, draw_defects
from fastmaf.inspection.workflow.choose import choose
from fastmaf.inspection.workflow.evaluate import evaluate
from fastmaf.inspection.workflow.fit import fit as fit_folder
from fastmaf.io.tensor_file import read_tensors, write_tensors
from tests.inspection.tiny import silent

HEIGHT, WIDTH = 24, 48
DEFECT = np.s_[:, 4:9, 36:41]
RECIPE = Recipe(
    size=16, rank=6, blocks=0, folds=3, aspect=HEIGHT / WIDTH, score=ScoreSettings(), map_config=AnomalyMapConfig()
)

pytestmark = pytest.mark.filterwarnings("ignore:a false-alarm rate of:UserWarning")


def parts(n: int, seed: int = 0) -> np.ndarray:
    """Images of a disc that moves a little, uint8 ``[n, HEIGHT, WIDTH, 3]``."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    y, x = (side / 2 + rng.uniform(-0.5, 0.5, (n, 1, 1)) for side in (HEIGHT, WIDTH))
    disc = np.clip(9 - np.hypot(rows - y, columns - x), 0, 1)
    values = 60 + 120 * disc[..., None] + rng.normal(0, 3, (n, HEIGHT, WIDTH, 3))
    return np.clip(values, 0, 255).astype(np.uint8)


def damaged(n: int) -> np.ndarray:
    images = parts(n, seed=1)
    images[DEFECT] = 240
    return images


def squares(images: np.ndarray, side: int) -> torch.Tensor:
    resized = [Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    return fit(squares(parts(24), RECIPE.side), RECIPE, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[DEFECT[1:]] = 255
    for place, images in (("train/good", parts(24)), ("test/good", parts(4, 2)), ("test/spot", damaged(4))):
        (root / place).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / place / f"{i}.png")
    (root / "ground_truth" / "spot").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(mask).save(root / "ground_truth" / "spot" / f"{i}_mask.png")
    return root


@pytest.mark.parametrize("aspect", [0.1, 0.25, 0.4, 0.75, 1.3, 2.0, 4.0, 30.0])
def test_shapes(aspect: float) -> None:
    for size in (64, 128):
        height, width = shape_for(size, aspect, 2)
        assert height % 2 == width % 2 == 0 and max(height, width) <= 2 * size and min(height, width) >= 8
        if 0.25 <= aspect <= 4:
            assert height * width == pytest.approx(size**2, rel=0.05)
        if 0.1 <= aspect <= 10:
            assert height / width == pytest.approx(aspect, rel=0.1)
        assert shape_for(size, 1 / aspect, 2) == (width, height)
    recipe = Recipe(size=64, aspect=aspect)
    assert recipe.features == 3 * recipe.shape[0] * recipe.shape[1] and recipe.side == max(recipe.shape)


def test_aspect_of_images() -> None:
    assert aspect_of([]) == aspect_of([(100, 104), (96, 100)]) == 1
    assert aspect_of([(50, 100)] * 3 + [(100, 50)]) == 0.5
    assert Recipe(size=17, blocks=0).shape == (17, 17) and Recipe(size=16, aspect=1.0).side == 16
    assert usable_side([(32, 128), (33, 132)]) == 64 and usable_side([(70, 70), (70, 72)]) == 70
    assert fitted_into(200, 2.0) == (200, 100) and fitted_into(200, 0.001) == (1, 200)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="aspect must be positive and finite"):
            Recipe(aspect=wrong)


def test_smoothing_along_both_axes() -> None:
    planes = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 7, 12)))
    expected = gaussian_filter(planes.numpy(), (0, 1.3, 1.3), mode="nearest")
    np.testing.assert_allclose(smoothed(planes, 1.3).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_copies() -> None:
    x = torch.arange(2.0 * 6 * 10).view(1, 2, 6, 10) / 120
    basis, weights = shifts((6, 10), 1, 1.0)(x)
    copies = torch.einsum("cp,npd->ncd", weights, basis).view(9, 2, 6, 10)
    assert torch.equal(copies[4], x[0])
    assert torch.allclose(copies[1, :, 1:], x[0, :, :-1]) or torch.allclose(copies[7, :, 1:], x[0, :, :-1])
    turned, _ = rotations((6, 10), 2)(x)
    assert torch.allclose(turned.view(2, 2, 6, 10)[1], x[0].flip(1, 2), atol=1e-5)
    # A point turned by 90 degrees stays at its distance from the centre, in pixels.
    point = torch.zeros(1, 1, 9, 21)
    point[..., 4, 13] = 1.0
    quarter = rotations((9, 21), 4)(point)[0].view(4, 9, 21)[1]
    assert (quarter > 0.5).nonzero().tolist() in ([[1, 10]], [[7, 10]])


@pytest.mark.parametrize("kind", KINDS)
def test_defects_are_drawn_onto_images_of_any_shape(kind: str) -> None:
    good = torch.from_numpy(parts(3)).permute(0, 3, 1, 2).contiguous()
    for images in (good, good.transpose(2, 3).contiguous()):
        drawn = draw_defects(images, kinds=[kind])
        changed = (drawn.pixels.int() - images.int()).abs().amax(dim=1) > 2
        assert drawn.pixels.shape == images.shape and bool((drawn.masks | ~changed).all())
        assert bool(changed.flatten(1).any(dim=1).all())


def test_a_model_keeps_the_aspect_ratio(fitted: Fitted, tmp_path: Path) -> None:
    model, side = fitted.model, RECIPE.side
    assert model.shape == RECIPE.shape == (12, 22) and model.size == side == 22 and model.channels == 3
    assert model.flow.features == 3 * 12 * 22
    bad = model.predict(squares(damaged(4), side))
    good = model.predict(squares(parts(8, 3), side))
    assert bad.scores.min() > good.scores.max() and bad.anomaly_maps.shape == (4, side, side)
    for anomaly_map in brought_to(bad.anomaly_maps, (HEIGHT, WIDTH)):
        y, x = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
        assert 3 <= y <= 9 and 35 <= x <= 41
    np.testing.assert_array_equal(model.scores(squares(damaged(4), side)), bad.scores)
    np.testing.assert_array_equal(model.anomaly_maps(squares(damaged(4), side)), bad.anomaly_maps)
    model.save(tmp_path / "m.safetensors")
    loaded = load_inspection(tmp_path / "m.safetensors")
    assert isinstance(loaded, InspectionModel) and loaded.shape == model.shape
    prediction = loaded.predict(squares(damaged(4), side))
    for name in ("scores", "anomaly_maps", "nll"):
        np.testing.assert_array_equal(getattr(prediction, name), getattr(bad, name))


def test_held_out_results_are_those_of_images_as_they_are_read(fitted: Fitted) -> None:
    pixels = squares(parts(24), RECIPE.side)
    again = PixelCandidate(fitted).held_out([pixels])
    np.testing.assert_array_equal(again.scores, fitted.held_out.scores)
    np.testing.assert_allclose(again.maps, fitted.held_out.maps, rtol=1e-5, atol=1e-6)
    assert again.maps.shape == (1, 24, RECIPE.side, RECIPE.side) and PixelCandidate(fitted).name == "16 pixels"


def test_a_shape_that_is_not_that_of_the_flow_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    fitted.model.save(tmp_path / "m.safetensors")
    tensors, metadata = read_tensors(tmp_path / "m.safetensors")
    record = json.loads(metadata["inspection"])
    assert record["shape"] == [12, 22]
    for shape in ([12, 23], [12], [0, 22], "12 x 22", None):
        changed = {**record, "shape": shape}
        if shape is None:
            del changed["shape"]
        write_tensors(tensors, tmp_path / "x.safetensors", {**metadata, "inspection": json.dumps(changed)})
        with pytest.raises(fastmaf.CheckpointError, match="shape|square|12 x 23"):
            load_inspection(tmp_path / "x.safetensors")


def test_files_of_square_images_are_as_they_were(tmp_path: Path) -> None:
    recipe = replace(RECIPE, aspect=1.0)
    model = fit(squares(parts(12), 16), recipe, progress=False).model
    model.save(tmp_path / "m.safetensors")
    assert "shape" not in json.loads(read_tensors(tmp_path / "m.safetensors")[1]["inspection"])
    assert model.shape == (16, 16) and load_inspection(tmp_path / "m.safetensors").size == 16


def test_onnx_export(fitted: Fitted, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    report = export_onnx(fitted.model, tmp_path / "m.onnx", [*parts(3, 4), *damaged(2)])
    assert report.score < 1e-3 and report.map < 1e-3


def test_sizes(tmp_path: Path) -> None:
    recipe = replace(RECIPE, size=64)
    fitted = fit_sizes(squares(parts(12), 46), (16, 32), recipe, budget=1e6, progress=False)
    assert [candidate.size for candidate in fitted.candidates] == [22, 46] and fitted.model.size == 46
    assert [candidate.name for candidate in fitted.candidates] == ["16 pixels", "32 pixels"]
    with pytest.raises(ValueError, match="sizes must ascend to 44, the side of the images"):
        fit_sizes(squares(parts(12), 44), (16, 32), recipe, progress=False)


@pytest.mark.parametrize("tiles", [1, 2])
def test_detector(tiles: int, tmp_path: Path) -> None:
    detector = fastmaf.Detector(size=16, rank=6, blocks=0, folds=3, tiles=tiles).fit(parts(24))
    maps = detector.anomaly_map(damaged(2))
    height, width = maps.shape[1:]
    assert height / width == pytest.approx(0.5, rel=0.1) and width == detector.model_.size
    assert detector.sizes_ == (16,) and detector.anomaly_score(damaged(2)).min() > detector.decision_scores_.mean()
    y, x = np.unravel_index(maps[0].argmax(), maps.shape[1:])
    assert y / height == pytest.approx(6.5 / HEIGHT, abs=0.1) and x / width == pytest.approx(38.5 / WIDTH, abs=0.1)
    detector.save(tmp_path / "m.safetensors")
    loaded = fastmaf.Detector.load(tmp_path / "m.safetensors")
    assert loaded.size == 16 and loaded.tiles == tiles
    np.testing.assert_array_equal(loaded.anomaly_map(damaged(2)), maps)


def test_workflow(folder: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, aspect=None)
    said: list[str] = []
    fit_folder(folder, tmp_path / "run", recipe, keep_folds=True, progress=False, say=said.append)
    model = load_inspection(tmp_path / "run")
    assert isinstance(model, InspectionModel) and model.shape == (12, 22)
    assert "aspect" not in model.about["configuration"] and not any("aspect ratio" in text for text in said)
    result = evaluate(tmp_path / "run", folder, tmp_path / "eval", progress=False, say=silent)
    assert result.rows[0].auroc == 1 and result.rows[0].pixel_auroc > 0.9
    assert any("3 folds" in row.name for row in result.rows)


def test_images_of_another_aspect_ratio_are_named(folder: Path, tmp_path: Path) -> None:
    for i, image in enumerate(parts(6)):
        Image.fromarray(image if i else image[:, :HEIGHT]).save(tmp_path / f"{i}.png")
    said: list[str] = []
    fit_folder(tmp_path, tmp_path.parent / "mixed", replace(RECIPE, aspect=None), progress=False, say=said.append)
    assert any(text.startswith("1 image of another aspect ratio than the median") for text in said)
    fit_folder(tmp_path, tmp_path.parent / "as_squares", replace(RECIPE, aspect=1.0), progress=False, say=silent)
    assert load_inspection(tmp_path.parent / "as_squares").size == 16


@pytest.mark.slow
def test_choose(folder: Path) -> None:
    assert choose(folder, size=16, draws=1, progress=False, say=silent).images == 24


def test_squared_maps_cover_the_whole_image() -> None:
    ramp = np.linspace(0, 1, 8, dtype=np.float32)[None, None].repeat(4, 1)
    large = squared(ramp, 8)
    np.testing.assert_array_equal(large, np.linspace(0, 1, 8, dtype=np.float32)[None, None].repeat(8, 1))
    assert squared(large, 8) is large
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert reduced(images, (4, 8)).shape == (2, 3, 4, 8) and reduced(images, (8, 8)) is images
