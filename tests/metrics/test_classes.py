"""Test sets with unexpected names of class folders, or with one kind of image only."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest

import fastmaf
from fastmaf.capsule.evaluate import evaluate
from fastmaf.capsule.models import Model
from fastmaf.metrics.classes import doubtful, require_both
from fastmaf.metrics.results import EvaluationError
from tests.images.pictures import capsule_set


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(fastmaf.MAF(48, 1, (8,), seed=0), 4, tmp_path / "model.safetensors", ())


@pytest.mark.parametrize("name", ["Good", "GOOD", "goood", "ok", "OK", "normal", "Normals", "no defect", "IO"])
def test_a_misnamed_folder_of_normals_is_proposed(model: Model, tmp_path: Path, name: str) -> None:
    root = capsule_set(tmp_path / "set")
    (root / "test" / "good").rename(root / "test" / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(EvaluationError) as caught:
            evaluate(model, root, tmp_path / "out", progress=False)
    message = str(caught.value)
    assert "found no good ones (" in message and f"{name} 2" in message and "poke 2" in message
    assert f"did you mean {root / 'test' / name} (expected the name good)?" in message
    assert f"expected: {root / 'test' / 'good'} with good images" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_sets_of_one_kind_only(model: Model, tmp_path: Path) -> None:
    root = capsule_set(tmp_path / "set")
    shutil.rmtree(root / "test" / "good")
    with pytest.raises(EvaluationError) as caught:
        evaluate(model, root, tmp_path / "out", progress=False)
    assert "found no good ones (crack 2, poke 2), in the folders of" in str(caught.value)
    assert "did you mean" not in str(caught.value)
    (root / "test" / "crack").rename(root / "test" / "good")
    shutil.rmtree(root / "test" / "poke")
    with pytest.raises(
        EvaluationError, match=r"found no defective ones \(good 2\), in the folders of .*\nexpected: .*test"
    ):
        evaluate(model, root, tmp_path / "out", progress=False)


def test_a_class_named_like_normals_beside_good_is_reported(tmp_path: Path) -> None:
    assert doubtful(["good", "Good", "ok", "ok", "crack"]) == [
        "class folder test/Good (1 image) counts as a defect class; if its images are good, move them to test/good",
        "class folder test/ok (2 images) counts as a defect class; if its images are good, move them to test/good",
    ]
    assert doubtful(["good", "crack", "wood"]) == [] == doubtful(["Good", "crack"])
    require_both(["good", "crack"], tmp_path)


def test_classes_of_the_synthetic_set_are_not_doubtful() -> None:
    assert doubtful(["good", "crack", "faulty_imprint", "poke", "scratch", "squeeze"]) == []
