"""Models of objects at any angle: fits, files, scores, maps, and the commands that take them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastmaf
from fastmaf.images.reduce import reduced
from fastmaf.inspection.decisions import decisions
from fastmaf.inspection.detector import Detector
from fastmaf.inspection.framed import seen_by
from fastmaf.inspection.model import InspectionModel, load_inspection
from fastmaf.inspection.pose import turned
from fastmaf.inspection.posed import PosedModel, in_one_pose
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.sizes import sizes_of
from fastmaf.inspection.workflow.calibrate import recalibrate
from fastmaf.inspection.workflow.evaluate import evaluate
from fastmaf.inspection.workflow.export import export
from fastmaf.inspection.workflow.fit import fit
from fastmaf.inspection.workflow.score import score_images
from fastmaf.io.tensor_file import read_tensors, write_tensors
from tests.inspection.tiny import silent
from tests.inspection.turned_objects import SIDE, objects

RECIPE = Recipe(32, rank=40, blocks=0, folds=3)


def drawn(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    angles = 360 * torch.rand(n, generator=generator, dtype=torch.float64)
    return objects(angles, 0.04 * torch.randn(n, 2, generator=generator), seed)


def with_spots(pixels: Tensor) -> tuple[Tensor, np.ndarray]:
    """Returns images with a bright square on the object, and the place of each."""
    defective, places = pixels.clone(), []
    for image in defective:
        dark = (image[0] < 90).nonzero()
        row, column = (int(k) for k in dark[len(dark) // 3])
        image[:, row - 2 : row + 3, column - 2 : column + 3] = 255
        places.append((row, column))
    return defective, np.array(places)


def written(folder: Path, pixels: Tensor) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turned")
    written(folder / "train" / "good", drawn(40, 0))
    written(folder / "test" / "good", drawn(8, 1))
    written(folder / "test" / "spot", with_spots(drawn(8, 2))[0])
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    result = fit(data, out, RECIPE, kind="auto", keep_folds=True, progress=False, say=silent)
    assert isinstance(result.model, PosedModel) and result.model.part is result.fitted.model
    assert "turned to one pose" in result.describe() and "kind: object" in result.describe()
    return out


@pytest.fixture
def model(run: Path) -> PosedModel:
    loaded = load_inspection(run)
    assert isinstance(loaded, PosedModel)
    return loaded


def test_images_are_turned_before_they_are_reduced(model: PosedModel) -> None:
    assert model.size == SIDE and isinstance(model.part, InspectionModel) and model.part.size == 32
    pixels = drawn(5, 3)
    expected = model.part.predict(reduced(turned(pixels, model.pose.places(pixels)), 32))
    found = model.predict(pixels)
    assert (found.scores == expected.scores).all() and (found.nll == expected.nll).all()
    assert found.anomaly_maps.shape == (5, SIDE, SIDE)
    assert sizes_of(model) == (32,) and seen_by(model) is model.part and seen_by(model.part) is model.part
    assert len(model.predict(pixels[:0])) == 0


def test_scores_do_not_depend_on_the_batch(model: PosedModel) -> None:
    pixels = drawn(5, 4)
    together = model.predict(pixels)
    alone = [model.predict(image[None]) for image in pixels]
    assert (together.scores == np.concatenate([each.scores for each in alone])).all()
    assert (together.anomaly_maps == np.concatenate([each.anomaly_maps for each in alone])).all()


def test_defects_are_found_where_they_are(model: PosedModel) -> None:
    good, (defective, places) = drawn(12, 5), with_spots(drawn(12, 6))
    normal, found = model.predict(good), model.predict(defective)
    assert np.median(found.scores) > normal.scores.max()
    highest = [np.unravel_index(one.argmax(), one.shape) for one in found.anomaly_maps]
    distances = np.linalg.norm(np.array(highest) - places, axis=1)
    assert np.median(distances) < 4
    assert model.calibration.is_anomalous(normal.scores).sum() <= 3


def test_the_commands_take_it(run: Path, data: Path, tmp_path: Path) -> None:
    result = evaluate(run, data, tmp_path / "eval", progress=False, say=silent)
    first, *others = result.rows
    assert first.auroc > 0.9 and first.auroc > max(row.auroc for row in others if "PCA" in row.name)
    assert any("folds" in row.name for row in others)
    summary: list[str] = []
    options: dict[str, Any] = {"progress": False, "stdout": io.StringIO(), "say": summary.append}
    maps = tmp_path / "maps"
    scored = score_images(run, [str(data / "test")], out=tmp_path / "s.csv", overlays=maps, **options)
    assert scored.images == 16 and len(list(maps.rglob("*.png"))) == 16
    (tmp_path / "again.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    recalibrate(tmp_path / "again.safetensors", [str(data / "test" / "good")], 0.2, progress=False, say=silent)
    again = load_inspection(tmp_path / "again.safetensors")
    assert isinstance(again, PosedModel) and again.calibration.n == 8
    assert "agree on 8 images" in export(run, tmp_path / "m.onnx", [str(data / "test" / "good")], say=silent)


def test_the_detector_turns_objects_too(run: Path, tmp_path: Path) -> None:
    pixels = drawn(40, 0).permute(0, 2, 3, 1).numpy()
    detector = Detector(size=32, rank=40, blocks=0, folds=3).fit(pixels)
    assert isinstance(detector.model_, PosedModel) and detector.sizes_ == (32,)
    assert detector.n_features_in_ == 3 * 32**2 and len(detector.decision_scores_) == 40
    defective, _ = with_spots(drawn(8, 7))
    assert (detector.predict(defective.permute(0, 2, 3, 1).numpy()) == -1).sum() >= 6
    detector.save(tmp_path / "m.safetensors", card=tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text("utf-8")
    assert "m.safetensors" in card and ".tmp" not in card
    assert "turned to one pose" in card and f"resized to {SIDE} × {SIDE} pixels, turned" in card
    loaded = Detector.load(tmp_path / "m.safetensors")
    assert (loaded.anomaly_score(pixels[:3]) == detector.anomaly_score(pixels[:3])).all()
    assert loaded.size == 32 and loaded.rank == 40
    assert loaded.anomaly_map(pixels[:2]).shape[0] == 2


def test_objects_in_one_pose_and_other_wishes_are_left_as_they_are() -> None:
    straight = objects(torch.zeros(24, dtype=torch.float64), torch.zeros(24, 2)).permute(0, 2, 3, 1).numpy()
    assert isinstance(Detector(size=16, rank=8, blocks=0, folds=2).fit(straight).model_, InspectionModel)
    pixels = drawn(24, 8)
    assert in_one_pose(pixels, None, RECIPE) is not None
    for change in ({"augmentation": "rotations"}, {"aspect": 2.0}, {"pose": "none"}):
        assert in_one_pose(pixels, None, replace(RECIPE, **change)) is None
    as_they_are = Detector(size=16, rank=8, blocks=0, folds=2, pose="none").fit(pixels.permute(0, 2, 3, 1).numpy())
    assert isinstance(as_they_are.model_, InspectionModel)
    with pytest.raises(ValueError, match="pose must be 'auto' or 'none'; found 'any'"):
        replace(RECIPE, pose="any")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors.pop("reference"), "reference: expected one; found nothing"),
        (lambda tensors, _: tensors.update(reference=torch.zeros(3, 4)), "reference: expected torch.float64"),
        (lambda tensors, _: tensors["reference"].fill_(torch.nan), "reference: expected numbers from -255 to 255"),
        (
            lambda _, texts: texts.update(inspection='{"kind": "posed", "size": 16, "moves": true}'),
            "size must be at least",
        ),
        (lambda tensors, _: tensors["reference"].zero_(), "reference: expected numbers from -255 to 255"),
        (
            lambda _, texts: texts.update(inspection='{"kind": "posed", "size": 257, "moves": true}'),
            "to 256; found 257",
        ),
        (lambda _, texts: texts.update(inspection='{"kind": "posed", "size": 64}'), "moves"),
    ],
)
def test_damaged_files_are_refused(run: Path, tmp_path: Path, change: Any, message: str) -> None:
    tensors, texts = read_tensors(run / "model.safetensors")
    change(tensors, texts)
    write_tensors(tensors, tmp_path / "m.safetensors", texts)
    with pytest.raises(fastmaf.CheckpointError, match=message):
        load_inspection(tmp_path / "m.safetensors")


def test_the_decisions_are_those_of_the_model_of_turned_images(model: PosedModel) -> None:
    assert decisions(model)["kind"].startswith("object (the mean image explains")
    assert "augmentation" in decisions(model)
