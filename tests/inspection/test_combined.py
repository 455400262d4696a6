"""Several models as one: scores, maps, files, export, and the commands that take such a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastmaf
from fastmaf.images.dataset import load_train
from fastmaf.images.reduce import reduced
from fastmaf.inspection.combined import CombinedModel, combine
from fastmaf.inspection.fit import fit
from fastmaf.inspection.interface import scores_of
from fastmaf.inspection.map_shapes import squared
from fastmaf.inspection.model import is_inspection_model, load_inspection
from fastmaf.inspection.pixel_candidate import PixelCandidate
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.inspection.selection.candidates import combined_model
from fastmaf.inspection.workflow.calibrate import calibrate, recalibrate
from fastmaf.inspection.workflow.evaluate import evaluate
from fastmaf.inspection.workflow.export import export
from fastmaf.inspection.workflow.score import score
from fastmaf.io.tensor_file import read_tensors, write_tensors
from tests.inspection.tiny import silent

Candidates = tuple[torch.Tensor, list[PixelCandidate]]


@pytest.fixture(scope="module")
def candidates(data: Path) -> Candidates:
    pixels = load_train(data, size=16, progress=False).pixels
    fitted = []
    for size in (8, 16):
        recipe = Recipe(size, 6, blocks=0, folds=3, score=ScoreSettings(), map_config=AnomalyMapConfig(factors=4))
        fitted.append(PixelCandidate(fit(reduced(pixels, size), recipe, progress=False)))
    return pixels, fitted


@pytest.fixture(scope="module")
def model(candidates: Candidates) -> CombinedModel:
    pixels, parts = candidates
    held = [part.held_out([reduced(pixels, part.size)]) for part in parts]
    return combined_model([p.model() for p in parts], combine([p.name for p in parts], held, 16), 16, 0.05)


@pytest.fixture
def file(model: CombinedModel, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    model.save(path)
    return path


def test_the_score_is_the_sum_of_standardised_scores(candidates: Candidates, model: CombinedModel) -> None:
    pixels, parts = candidates
    expected = np.zeros(len(pixels))
    for part in parts:
        held = part.held_out([reduced(pixels, part.size)]).scores[0]
        expected += (part.model().predict(reduced(pixels, part.size)).scores - held.mean()) / held.std()
    np.testing.assert_allclose(model.predict(pixels).scores, expected, rtol=1e-12)


def test_maps_have_equal_shares_and_mean_square_one_over_held_out_images(candidates: Candidates) -> None:
    pixels, parts = candidates
    held = [part.held_out([reduced(pixels, part.size)]) for part in parts]
    standards, together = combine([part.name for part in parts], held, 16)
    assert np.square(together.maps[0], dtype=np.float64).mean() == pytest.approx(1, rel=1e-5)
    shares = [np.square(h.maps[0] / s.map_unit, dtype=np.float64).mean() for h, s in zip(held, standards, strict=True)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-5)
    expected = sum(squared(h.maps[0], 16) / s.map_unit for h, s in zip(held, standards, strict=True))
    np.testing.assert_allclose(together.maps[0], expected, rtol=1e-4, atol=1e-6)


def test_the_calibration_scores_are_those_of_held_out_images(candidates: Candidates, model: CombinedModel) -> None:
    pixels, parts = candidates
    assert model.calibration.n == len(pixels) and model.calibration.how == "k-fold" and model.calibration.folds == 3
    assert abs(model.calibration.scores.mean()) < 1e-9  # a sum of standardised scores
    part = parts[1]
    np.testing.assert_array_equal(np.sort(part.held_out([pixels]).scores[0]), part.model().calibration.scores)


def test_results_do_not_depend_on_the_batch(candidates: Candidates, model: CombinedModel) -> None:
    pixels, whole = candidates[0], model.predict(candidates[0])
    for i in range(3):
        np.testing.assert_array_equal(model.predict(pixels[i : i + 1]).scores, whole.scores[i : i + 1])
    with pytest.raises(ValueError, match=r"uint8 \[n, 3, 16, 16\]; found torch.uint8 \[24, 3, 8, 8\]"):
        model.predict(reduced(pixels, 8))


def test_scores_and_maps_are_the_same_without_nll(candidates: Candidates, model: CombinedModel) -> None:
    pixels = candidates[0][:3]
    expected, found = model.predict(pixels), model.predict(pixels, nll=False)
    assert (found.scores == expected.scores).all() and (found.anomaly_maps == expected.anomaly_maps).all()
    assert np.isfinite(expected.nll).all() and (scores_of(model, pixels) == expected.scores).all()


def test_saved_and_loaded(candidates: Candidates, model: CombinedModel, file: Path) -> None:
    assert is_inspection_model(file) and [path.name for path in file.parent.iterdir()] == ["model.safetensors"]
    loaded = load_inspection(file)
    assert isinstance(loaded, CombinedModel) and loaded.standards == model.standards and loaded.about == model.about
    expected, found = model.predict(candidates[0]), loaded.predict(candidates[0])
    for name in ("scores", "anomaly_maps", "nll"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert np.array_equal(loaded.calibration.scores, model.calibration.scores)
    assert loaded.map_levels == model.map_levels


def test_the_model_card_names_the_parts(model: CombinedModel, tmp_path: Path) -> None:
    model.save(tmp_path / "m.safetensors", card=tmp_path / "card.md")
    assert "| Parts | 8 pixels, 16 pixels |" in (tmp_path / "card.md").read_text("utf-8")
    (tmp_path / "card.md").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        model.save(tmp_path / "m.safetensors", card=tmp_path / "card.md")


def damaged(file: Path, **changes: Any) -> None:
    tensors, metadata = read_tensors(file)
    record = json.loads(metadata["inspection"])
    record.update(changes)
    write_tensors(tensors, file, {**metadata, "inspection": json.dumps(record)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "unknown"}, "a kind among pixels, combined.*; found 'unknown'"),
        ({"kind": ["combined"]}, "a kind among pixels, combined"),
        ({"size": 8}, "size must be at least that of each part, 16; found 8"),
        ({"parts": []}, "inspection.parts: expected"),
        ({"parts": 3 * [{"name": "a", "mean": 0.0, "deviation": 1.0, "map_unit": 1.0}]}, "not an inspection model"),
        ({"parts": 2 * [{"name": "a", "mean": 0.0, "deviation": 0.0, "map_unit": 1.0}]}, "deviation: expected"),
        ({"more": 1}, "inspection"),
    ],
)
def test_damaged_files_are_refused(file: Path, changes: dict[str, Any], message: str) -> None:
    damaged(file, **changes)
    with pytest.raises(fastmaf.CheckpointError, match=message):
        load_inspection(file)


def test_combined_models_within_one_are_refused(model: CombinedModel, tmp_path: Path) -> None:
    outer = CombinedModel((model,), model.standards[:1], 16, model.calibration, model.about)
    outer.save(tmp_path / "outer.safetensors")
    with pytest.raises(fastmaf.CheckpointError, match="part 0 is a combined model itself"):
        load_inspection(tmp_path / "outer.safetensors")
    with pytest.raises(fastmaf.CheckpointError):
        fastmaf.load(tmp_path / "outer.safetensors")


def test_parts_must_fit(model: CombinedModel) -> None:
    with pytest.raises(ValueError, match="at least that of each part, 16; found 12"):
        replace(model, size=12)
    with pytest.raises(ValueError, match="found 2 parts and 1 standards"):
        replace(model, standards=model.standards[:1])


def test_the_commands_take_a_combined_model(data: Path, file: Path, tmp_path: Path) -> None:
    with open(tmp_path / "rows.csv", "w") as rows:
        assert not score(file, [str(data / "test")], stdout=rows, progress=False, say=silent)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + 10
    assert calibrate(file, 0.2, say=silent).false_alarm == 0.2
    assert recalibrate(file, [str(data / "train" / "good")], 0.1, progress=False, say=silent).how == "split"
    result = evaluate(file, data, tmp_path / "out", progress=False, say=silent)
    assert [row.name for row in result.rows[:3]] == ["sum of standardised scores", "8 pixels", "16 pixels"]
    assert "8 pixels, 16 pixels" not in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_the_detector_loads_a_combined_model(candidates: Candidates, model: CombinedModel, file: Path) -> None:
    detector = fastmaf.Detector.load(file)
    images = candidates[0].permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(detector.anomaly_score(images), model.predict(candidates[0]).scores)
    assert detector.anomaly_map(images[:2]).shape == (2, 16, 16) and detector.n_features_in_ == 3 * 16**2


def test_the_graph_agrees(data: Path, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    text = export(file, tmp_path / "m.onnx", [str(data / "test")], say=silent)
    assert "agree on 10 images" in text
