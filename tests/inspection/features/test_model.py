"""Models of features: predictions, files, and their part in combined models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.features.candidate import FeatureCandidate, fit_features
from fastmaf.inspection.features.extractor import Extractor
from fastmaf.inspection.features.model import FeatureModel
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.model import is_inspection_model, load_inspection
from fastmaf.inspection.workflow.calibrate import calibrate, recalibrate
from fastmaf.inspection.workflow.evaluate import evaluate
from fastmaf.inspection.workflow.export import export
from fastmaf.inspection.workflow.score import score
from fastmaf.io.tensor_file import read_tensors, write_tensors
from tests.inspection.features.conftest import TwoMaps
from tests.inspection.tiny import silent


@pytest.fixture(scope="module")
def model(candidate: FeatureCandidate) -> FeatureModel:
    return candidate.model()


@pytest.fixture
def file(model: FeatureModel, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    model.save(path)
    return path


def test_results_do_not_depend_on_the_batch(model: FeatureModel, pixels: Tensor) -> None:
    as_model: AnomalyModel = model
    whole = as_model.predict(pixels)
    assert whole.scores.dtype == np.float64 and whole.anomaly_maps.shape == (24, 32, 32)
    assert whole.anomaly_maps.dtype == np.float32 and np.isfinite(whole.nll).all()
    for i in (0, 7):
        one = model.predict(pixels[i : i + 1])
        for name in ("scores", "anomaly_maps", "nll"):
            np.testing.assert_array_equal(getattr(one, name), getattr(whole, name)[i : i + 1])
    assert len(model.predict(pixels[:0])) == 0


def test_images_of_another_size_are_refused(model: FeatureModel, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[n, 3, 32, 32\]; found torch.float32"):
        model.predict(pixels.float())
    with pytest.raises(ValueError, match=r"must be \[n, 176, 2, 2\] on their grid; found \[1, 176, 4, 4\]"):
        model.predict_features(torch.zeros(1, 176, 4, 4))


def test_a_defect_is_seen_where_it_is(model: FeatureModel, pixels: Tensor) -> None:
    defective = pixels[:1].clone()
    defective[:, :, :14, 18:] = torch.randint(0, 256, (3, 14, 14), dtype=torch.uint8)
    before, after = model.predict(pixels[:1]), model.predict(defective)
    assert after.scores[0] > before.scores[0]
    gain = after.anomaly_maps[0] - before.anomaly_maps[0]
    assert gain[:16, 16:].mean() > max(gain[:16, :16].mean(), gain[16:, :16].mean(), gain[16:, 16:].mean())


def test_saved_and_loaded(model: FeatureModel, file: Path, pixels: Tensor) -> None:
    assert is_inspection_model(file)
    loaded = load_inspection(file)
    assert isinstance(loaded, FeatureModel) and loaded.about == model.about
    expected, found = model.predict(pixels), loaded.predict(pixels)
    for name in ("scores", "anomaly_maps", "nll"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert np.array_equal(loaded.calibration.scores, model.calibration.scores)
    assert loaded.map_levels == model.map_levels


def test_the_model_card_names_the_network(model: FeatureModel, tmp_path: Path) -> None:
    model.save(tmp_path / "m.safetensors", card=tmp_path / "card.md")
    assert "| Features | efficientnet-lite0 |" in (tmp_path / "card.md").read_text("utf-8")


def test_features_of_ones_own_module_cannot_be_saved(pixels: Tensor, tmp_path: Path) -> None:
    own = fit_features(pixels, Extractor(TwoMaps(), size=32), progress=False).model()
    with pytest.raises(ValueError, match="features of TwoMaps cannot be saved"):
        own.save(tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def damaged(file: Path, changes: dict[str, Any], tensors: dict[str, Tensor | None]) -> None:
    found, metadata = read_tensors(file)
    record = json.loads(metadata["inspection"])
    record.update(changes)
    kept = {name: value for name, value in {**found, **tensors}.items() if value is not None}
    write_tensors(kept, file, {**metadata, "inspection": json.dumps(record)})


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"features": "resnet"}, {}, "features: expected one of 'efficientnet-lite0'"),
        ({"grid": [3, 2]}, {}, "grid: expected the size over 16"),
        ({"map_unit": 0.0}, {}, "map_unit: expected"),
        ({"size": 40}, {}, "grid: expected the size over 16"),
        ({}, {"mean": None}, "expected a tensor 'mean'; found none"),
        ({}, {"mean": torch.zeros(3, 176)}, "a row per location or one"),
        ({}, {"mean": torch.zeros(4, 175)}, "tensor mean: expected"),
        ({}, {"mean": torch.full((4, 176), float("nan"))}, "tensor mean: expected finite"),
        ({}, {"factor": torch.zeros(4, 176 * 177 // 2)}, "positive numbers on the diagonals"),
        ({}, {"distance_deviation": torch.zeros(4, dtype=torch.float64)}, "distance_deviation: expected at least"),
        ({}, {"network.stem.bias": torch.full((32,), float("inf"))}, "network.stem.bias: expected finite"),
        ({}, {"network.stem.bias": None}, "expected a tensor 'network.stem.bias'"),
        ({}, {"network.stem.bias": torch.zeros(32, dtype=torch.float64)}, "network.stem.bias: expected"),
        ({}, {"calibration_scores": torch.zeros(24)}, "calibration_scores: expected torch.float64"),
    ],
)
def test_damaged_files_are_refused(
    file: Path, changes: dict[str, Any], tensors: dict[str, Tensor | None], message: str
) -> None:
    damaged(file, changes, tensors)
    with pytest.raises(fastmaf.CheckpointError, match=message):
        load_inspection(file)


def test_the_commands_take_a_model_of_features(data: Path, file: Path, tmp_path: Path) -> None:
    with open(tmp_path / "rows.csv", "w") as rows:
        assert not score(file, [str(data / "test")], stdout=rows, progress=False, say=silent)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + 10
    assert calibrate(file, 0.2, say=silent).false_alarm == 0.2
    assert recalibrate(file, [str(data / "train" / "good")], 0.1, progress=False, say=silent).how == "split"
    result = evaluate(file, data, tmp_path / "out", progress=False, say=silent)
    assert "176 channels of efficientnet-lite0" in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert result.rows[0].name == "features of efficientnet-lite0"


def test_the_graph_agrees(data: Path, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert "agree on 10 images" in export(file, tmp_path / "m.onnx", [str(data / "test")], say=silent)
