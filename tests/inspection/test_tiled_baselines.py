"""Baselines of images in tiles: what they find, and the evaluation of a tiled model with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaf.inspection.baselines import PCAResidual, PixelGaussian, PNGSize, all_baselines
from fastmaf.inspection.detector import Detector
from fastmaf.inspection.tiled_baselines import TiledBaseline
from fastmaf.inspection.tiles import tile_of, tiled_size
from fastmaf.inspection.workflow.evaluate import evaluate
from tests.inspection.test_tiled import SIDE, images
from tests.inspection.tiny import silent


def with_a_spot(pixels: torch.Tensor) -> torch.Tensor:
    pixels = pixels.clone()
    pixels[:, :, 10:13, 2:5] = 255 - pixels[:, :, 10:13, 2:5]
    return pixels


@pytest.mark.parametrize("baseline", all_baselines(), ids=lambda baseline: baseline.name)
def test_the_most_anomalous_tile_counts(baseline: PixelGaussian) -> None:
    tiled = TiledBaseline(baseline, 8, 2).fit(images(24))
    assert tiled.name == baseline.name
    scores, maps = tiled.score(images(5, 1))
    alone = [tiled.score(images(5, 1)[i : i + 1])[0][0] for i in range(5)]
    np.testing.assert_allclose(scores, alone, rtol=1e-9)
    parts = []
    for i in range(4):
        cut = [tile_of(images(24), i, 8)[half::2] for half in (0, 1)]
        other = np.concatenate([baseline.fit(cut[half]).score(cut[1 - half])[0] for half in (0, 1)])
        of_tile = baseline.fit(tile_of(images(24), i, 8)).score(tile_of(images(5, 1), i, 8))[0]
        parts.append((of_tile - other.mean()) / (other.std() or 1.0))
    np.testing.assert_allclose(scores, np.max(parts, axis=0), rtol=1e-6)
    assert (maps is None) == isinstance(baseline, PNGSize)
    if maps is not None:
        (found,) = tiled.score(with_a_spot(images(1, 2)))[1:]
        assert found is not None and found.shape == (1, SIDE, SIDE)
        row, column = np.unravel_index(found[0].argmax(), (SIDE, SIDE))
        assert 9 <= row <= 13 and 1 <= column <= 5


def test_tiles_are_reduced_and_few_images_are_enough() -> None:
    side = tiled_size(160, 2)
    pixels = torch.randint(0, 256, (3, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scores, maps = TiledBaseline(PCAResidual(2), 160, 2).fit(pixels).score(pixels)
    assert scores.shape == (3,) and np.isfinite(scores).all() and maps is not None and maps.shape == (3, side, side)


def test_the_evaluation_of_a_tiled_model_has_them(tmp_path: Path) -> None:
    sets = {"train/good": images(24), "test/good": images(6, 1), "test/spot": with_a_spot(images(6, 2))}
    for place, pixels in sets.items():
        (tmp_path / place).mkdir(parents=True)
        for i, image in enumerate(pixels):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / place / f"{i}.png")
    files = sorted((tmp_path / "train" / "good").iterdir())
    Detector(size=8, tiles=2, rank=6, blocks=0, folds=3).fit(files).save(tmp_path / "m.safetensors")
    result = evaluate(tmp_path / "m.safetensors", tmp_path, tmp_path / "eval", progress=False, say=silent)
    rows = {row.name: row for row in result.rows if row.kind == "baseline"}
    assert set(rows) == {baseline.name for baseline in all_baselines()}
    assert rows["PCA standardised map"].auroc > 0.9
