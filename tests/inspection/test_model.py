"""Model files: what is written is read again, under the names of earlier versions, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastmaf
from fastmaf.inspection.fit import Fitted
from fastmaf.inspection.model import load_inspection

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
    tensors, metadata = fastmaf.read_tensors(new)
    record = renamed(json.loads(metadata["inspection"]))
    assert {"location", "settings"} <= set(record) and "grain" in record["settings"] and "usual" in record["location"]
    assert "copies" in record["about"]["recipe"] and "grain" in record["about"]["recipe"]["score"]
    fastmaf.write_tensors(tensors, old, {**metadata, "inspection": json.dumps(record)})
    loaded = load_inspection(old)
    expected, found = load_inspection(new).predict(pixels), loaded.predict(pixels)
    for name in ("scores", "anomaly_maps", "nll"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (loaded.settings, loaded.map_config) == (model.settings, model.map_config)
    assert loaded.about["recipe"] == load_inspection(new).about["recipe"]
    loaded.save(old)
    assert "map_config" in json.loads(fastmaf.read_tensors(old)[1]["inspection"])
