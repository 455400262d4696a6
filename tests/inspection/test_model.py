"""Model files: what is written is read again, under the names of earlier versions, too; damaged files are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastmaf
from fastmaf.inspection.fit import Fitted
from fastmaf.inspection.model import is_inspection_model, load_inspection
from fastmaf.io.tensor_file import read_tensors, write_tensors


@pytest.fixture
def model_copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the model file that a test may change."""
    path = tmp_path / "copy.safetensors"
    path.write_bytes((run / "model.safetensors").read_bytes())
    return path


OLD_NAMES = {
    "map_config": "location",
    "rms": "usual",
    "presmooth_sigma": "grain",
    "augmentation": "copies",
    "held_out_nll_of_augmentations": "held_out_nll_of_copies",
}


def renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {OLD_NAMES.get(key, key): renamed(item) for key, item in value.items()}
    return value


def test_a_file_of_an_earlier_version_gives_the_same_predictions(
    fitted: tuple[torch.Tensor, Fitted], tmp_path: Path
) -> None:
    pixels, model = fitted[0], fitted[1].model
    new, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    model.save(new)
    tensors, metadata = read_tensors(new)
    record = renamed(json.loads(metadata["inspection"]))
    assert {"location", "settings"} <= set(record) and "grain" in record["settings"] and "usual" in record["location"]
    assert "copies" in record["about"]["recipe"] and "grain" in record["about"]["recipe"]["score"]
    write_tensors(tensors, old, {**metadata, "inspection": json.dumps(record)})
    loaded = load_inspection(old)
    expected, prediction = load_inspection(new).predict(pixels), loaded.predict(pixels)
    for name in ("scores", "anomaly_maps", "nll"):
        np.testing.assert_array_equal(getattr(prediction, name), getattr(expected, name))
    assert (loaded.settings, loaded.map_config) == (model.settings, model.map_config)
    for key in ("recipe", "held_out_nll_of_augmentations"):
        assert loaded.about[key] == load_inspection(new).about[key]
    loaded.save(old)
    assert "map_config" in json.loads(read_tensors(old)[1]["inspection"])


def test_a_file_of_a_version_without_references_and_levels(fitted: tuple[torch.Tensor, Fitted], tmp_path: Path) -> None:
    file, model = tmp_path / "model.safetensors", fitted[1].model
    model = replace(model, settings=replace(model.settings, level_power=0.0))
    model.save(file)
    tensors, metadata = read_tensors(file)
    record = json.loads(metadata["inspection"])
    del record["settings"]["reference"], record["settings"]["level_power"]
    write_tensors(tensors, file, {**metadata, "inspection": json.dumps(record)})
    loaded = load_inspection(file)
    assert loaded.settings == replace(model.settings, reference="held-out")
    np.testing.assert_array_equal(loaded.predict(fitted[0]).scores, model.predict(fitted[0]).scores)


def test_saved_and_loaded(fitted: tuple[torch.Tensor, Fitted], tmp_path: Path) -> None:
    pixels, result = fitted
    result.model.save(tmp_path / "m.safetensors")
    loaded = load_inspection(tmp_path / "m.safetensors")
    expected, prediction = result.model.predict(pixels[:5]), loaded.predict(pixels[:5])
    for name in ("scores", "anomaly_maps"):
        np.testing.assert_array_equal(getattr(prediction, name), getattr(expected, name))
    assert loaded.settings == result.model.settings and loaded.map_levels == result.model.map_levels
    assert np.array_equal(loaded.calibration.scores, result.model.calibration.scores)
    assert len(loaded.predict(pixels[:0])) == 0
    with pytest.raises(ValueError, match=r"uint8 \[n, 3, 16, 16\]; found torch.uint8 \[5, 3, 8, 16\]"):
        loaded.predict(pixels[:5, :, :8])


@pytest.mark.parametrize("name", ["term_mean", "term_deviation", "calibration_scores"])
def test_a_damaged_model_is_refused(name: str, model_copy: Path) -> None:
    tensors, metadata = read_tensors(model_copy)
    tensors[f"extra.{name}"] = tensors[f"extra.{name}"] * float("nan")
    write_tensors(tensors, model_copy, metadata)
    with pytest.raises(fastmaf.CheckpointError, match="copy.safetensors"):
        load_inspection(model_copy)


def test_another_model_is_no_inspection_model(tmp_path: Path) -> None:
    fastmaf.MAF(48, 1, (8,), seed=0).save(tmp_path / "plain.safetensors")
    assert not is_inspection_model(tmp_path / "plain.safetensors")
    with pytest.raises(fastmaf.CheckpointError, match="fastmaf inspect fit"):
        load_inspection(tmp_path / "plain.safetensors")
