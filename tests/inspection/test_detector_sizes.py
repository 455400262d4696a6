"""``Detector(size="auto")``: the choice of ``fastmaf inspect fit --size auto``, by scikit-learn's conventions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from torch import nn

from fastmaf.inspection import detector, detector_input
from fastmaf.inspection import sizes as sizes_module
from fastmaf.inspection.combined import CombinedModel
from fastmaf.inspection.detector import Detector
from fastmaf.inspection.model import InspectionModel, load_inspection
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.workflow import fit as workflow
from fastmaf.inspection.workflow import load as loading
from tests.inspection.tiny import silent

SMALL: dict[str, Any] = {"rank": 6, "blocks": 0, "folds": 3}
pytestmark = pytest.mark.filterwarnings("ignore:a false-alarm rate of:UserWarning")


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sizes_module, loading, detector, detector_input):
        monkeypatch.setattr(module, "SIZES", (8, 16, 32))


@pytest.fixture(scope="module")
def files(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    few = tmp_path_factory.mktemp("few")
    for file in sorted((data / "train" / "good").iterdir())[:8]:
        shutil.copy(file, few)
    return sorted(few.iterdir())


def test_it_is_the_choice_of_the_command_line(files: list[Path], tmp_path: Path) -> None:
    workflow.fit(files[0].parent, tmp_path, Recipe(**SMALL), sizes="auto", progress=False, say=silent)
    expected = load_inspection(tmp_path)
    auto = Detector(size="auto", **SMALL)
    assert auto.fit(files) is auto
    for name in ("chosen", "drawn_auroc_of_candidates", "skipped_sizes"):
        assert auto.model_.about[name] == expected.about[name]
    assert auto.threshold_ == expected.calibration.threshold and auto.model_.size == expected.size == 16
    assert auto.sizes_ == tuple(int(name.split()[0]) for name in expected.about["chosen"].split(" + "))
    assert auto.n_features_in_ == 3 * 16**2


def test_parameters_are_kept_cloned_saved_and_loaded(files: list[Path], tmp_path: Path) -> None:
    auto = Detector(size="auto", budget=0, **SMALL).fit(files)
    assert auto.sizes_ == (8,) and auto.model_.about["skipped_sizes"] == [16]
    assert isinstance(auto.model_, CombinedModel) and auto.model_.size == 16
    auto.save(tmp_path / "auto.safetensors")
    loaded = Detector.load(tmp_path / "auto.safetensors")
    for copied in (clone(auto), loaded):
        assert copied.get_params()["size"] == "auto" and copied.get_params()["budget"] == 0
    assert loaded.sizes_ == auto.sizes_
    np.testing.assert_array_equal(loaded.predict(files), auto.predict(files))


def test_images_too_small_for_a_second_size_are_fitted_at_the_first(files: list[Path]) -> None:
    images = [np.asarray(Image.open(file).convert("RGB").resize((13, 16))) for file in files]
    auto = Detector(size="auto", **SMALL).fit(images)
    assert auto.sizes_ == (8,) and isinstance(auto.model_, InspectionModel)


class Features(nn.Module):
    """Mean colours of squares of 8 pixels."""

    def forward(self, x: Any) -> Any:
        return nn.functional.avg_pool2d(x, 8)


@pytest.mark.slow  # three candidates
def test_sizes_of_a_detector_with_features_are_of_its_models_of_pixels(files: list[Path]) -> None:
    auto = Detector(size="auto", features=Features(), **SMALL).fit(files)
    assert set(auto.sizes_) <= {8, 16} and auto.model_.about["skipped_sizes"] == []
    compared = {part for name in auto.model_.about["drawn_auroc_of_candidates"] for part in name.split(" + ")}
    assert {"8 pixels", "16 pixels"} < compared


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"size": "large"}, "size must be 'auto' or a number of pixels; found 'large'"),
        ({"size": "auto", "budget": -1}, "budget must be at least 0 seconds; found -1"),
        ({"size": "auto", "budget": float("nan")}, "budget must be at least 0 seconds; found nan"),
        ({"size": "auto", "tiles": 2}, "size='auto' is of whole images: expected tiles=1; found 2"),
    ],
)
def test_what_does_not_fit_is_named(files: list[Path], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Detector(**wrong).fit(files)
