"""Samples of a trained model: exact, repeatable, in batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastmaf
from fastmaf.capsule.models import Model
from fastmaf.capsule.sample import sample
from fastmaf.images.dataset import to_images
from fastmaf.images.samples import GRID_FILE, SAMPLES_FOLDER


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_samples_are_those_of_the_flow(model: Model, tmp_path: Path) -> None:
    result = sample(model, tmp_path, 7, seed=3, progress=False)
    with torch.no_grad():
        x = torch.cat([model.flow.sample(5, seed=3, start=start) for start in (0, 5)])[:7]
    expected = to_images(x, 8).numpy()
    assert result.files == [tmp_path / SAMPLES_FOLDER / f"{i:03d}.png" for i in range(7)]
    assert sorted((tmp_path / SAMPLES_FOLDER).iterdir()) == result.files
    assert all(np.array_equal(pixels(file), image) for file, image in zip(result.files, expected, strict=True))
    assert result.seconds > 0


def test_files_and_seconds_in_words_and_as_json(model: Model, tmp_path: Path) -> None:
    result = sample(model, tmp_path, 2, progress=False)
    text, summary = result.describe(), result.summary()
    assert text.startswith("2 samples in ") and str(tmp_path / SAMPLES_FOLDER) in text and str(result.grid) in text
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["samples"] == [str(file) for file in result.files] and summary["seconds"] == result.seconds


def test_the_grid_shows_all_of_them(model: Model, tmp_path: Path) -> None:
    result = sample(model, tmp_path, 3, progress=False)
    assert result.grid == tmp_path / GRID_FILE
    grid = pixels(result.grid)[..., :3].astype(int)
    for file in result.files:
        image = pixels(file).astype(int)
        enlarged = image.repeat(24, 0).repeat(24, 1)  # to 192 pixels
        at = [x for x in range(grid.shape[1] - 191) if abs(grid[6:198, x : x + 192] - enlarged).max() <= 1]
        assert len(at) == 1, f"{file.name} stands in the grid once"


def test_a_sample_is_the_same_however_many_are_drawn(model: Model, tmp_path: Path) -> None:
    many = sample(model, tmp_path / "many", 13, seed=4, progress=False).files
    for n in (1, 5, 6):
        few = sample(model, tmp_path / str(n), n, seed=4, progress=False).files
        assert [file.read_bytes() for file in few] == [file.read_bytes() for file in many[:n]]


def test_the_seed_makes_samples_repeatable(model: Model, tmp_path: Path) -> None:
    drawn = [sample(model, tmp_path / str(i), 2, seed=seed, progress=False) for i, seed in enumerate((0, 0, 1))]
    contents = [[file.read_bytes() for file in result.files] for result in drawn]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]
    assert contents[0][0] != contents[0][1], "two samples are two images"


@pytest.mark.parametrize("n", [0, -1])
def test_no_samples_is_an_error(model: Model, tmp_path: Path, n: int) -> None:
    with pytest.raises(ValueError, match=f"number of samples must be at least 1; found {n}"):
        sample(model, tmp_path, n, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_parameters(tmp_path: Path) -> None:
    whitening = fastmaf.GaussianWhitening(3 * 8 * 8, 2).fit_(torch.rand(9, 3 * 8 * 8))
    model = Model(fastmaf.Flow(3 * 8 * 8, [whitening]), 8, tmp_path / "model.safetensors", ())
    assert len(sample(model, tmp_path / "out", 2, progress=False).files) == 2
