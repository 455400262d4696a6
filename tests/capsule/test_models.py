"""Loading models of images, and their NLLs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fastmaf
from fastmaf.capsule.evaluate import evaluate
from fastmaf.capsule.models import Model, load_model, nll_of
from fastmaf.images.dataset import load_test


@pytest.mark.parametrize("features", [7, 30, 301])
def test_a_model_of_another_shape_is_refused_with_its_size(tmp_path: Path, features: int) -> None:
    path = tmp_path / "other.safetensors"
    fastmaf.MAF(features, 1, (8,), seed=0).save(path)
    with pytest.raises(fastmaf.CheckpointError, match=rf"square RGB images .*; found {features} features"):
        load_model(path)


def test_a_model_of_images_from_the_library_is_taken(labelled: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    fastmaf.MAF(300, 1, (16,), seed=0).save(path)
    model = load_model(path)
    assert (model.size, model.held_out) == (10, ())
    assert evaluate(model, labelled, tmp_path, progress=False).features == 300


def test_no_model_where_one_was_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model file at .*model\.safetensors"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_text("hello")
    with pytest.raises(fastmaf.CheckpointError, match="not a safetensors file"):
        load_model(tmp_path)


def test_scoring_in_batches_changes_nothing(model: Model, labelled: Path) -> None:
    images = load_test(labelled, size=8, progress=False)
    whole, cut = (nll_of(model.flow, images, batch_size=n, progress=False) for n in (64, 2))
    assert whole.dtype == np.float64
    np.testing.assert_allclose(cut, whole, rtol=1e-6)
    assert nll_of(model.flow, images.subset([]), progress=False).shape == (0,)
