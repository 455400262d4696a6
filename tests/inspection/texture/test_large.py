"""Textures of more than 512 pixels are seen at their own scale: reading, features in strips, windows, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastmaf.inspection.kinds import COMPARED, TEXTURE_SIZES, reduction_of, texture_size
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.out_of_fold import k_fold
from fastmaf.inspection.texture import features as module
from fastmaf.inspection.texture import fit
from fastmaf.inspection.texture.features import LEVELS, LONGEST, TextureFilters, to_texture
from fastmaf.inspection.texture.model import TextureModel
from fastmaf.inspection.texture.scoring import score_parts

SIDE, IMAGES = 544, 4
SHAPE = 272, 544


def weave(n: int, seed: int) -> torch.Tensor:
    """Squares of fine threads, of a width of one pixel once they have ``SHAPE`` again."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    threads = 128 + 30 * ((rows + columns) % 4 < 2) + rng.normal(0, 8, (n, *SHAPE))
    squares = torch.from_numpy(threads).float()[:, None].repeat_interleave(2, dim=2)
    return squares.clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def with_missing_threads(pixels: torch.Tensor) -> torch.Tensor:
    """The same, plain in an area of 12 x 12 pixels."""
    pixels = pixels.clone()
    pixels[:, :, 300:324, 400:412] = 143
    return pixels


@pytest.fixture(scope="module")
def model() -> TextureModel:
    with pytest.MonkeyPatch.context() as patch:  # blocks take most of the time
        patch.setattr(fit, "fit_blocks", lambda rows, contexts, whitening, seed: fit.without_blocks(whitening))
        return fit.fit_texture(weave(IMAGES, 0), k_fold(IMAGES, 2), shapes=[SHAPE] * IMAGES).fitted


def test_sizes() -> None:
    assert texture_size([(1024, 700)]) == TEXTURE_SIZES[-1] == 1024 and texture_size([(9000, 90)]) == 1024
    assert texture_size([(640, 640)]) == 512 and texture_size([(641, 100)]) == 1024
    assert texture_size([(2048, 2048)] * 10_000) == 512 == texture_size([(2048, 2048)], COMPARED)
    assert reduction_of([(640, 10)], 512) is None and "3000 pixels in the median, are reduced to 1024" in str(
        reduction_of([(3000, 10)], 1024)
    )


def test_images_keep_their_scale_up_to_the_longest_side() -> None:
    pixels = torch.zeros(3, 1024, 1024, dtype=torch.uint8)
    assert to_texture(pixels, (500, 1024), 1, 1024).shape == (1, 500, 1024)
    assert to_texture(pixels, (500, 2048), 1, 1024).shape == (1, 250, 1024)
    assert to_texture(pixels, (500, 1024), 1).shape == (1, LONGEST * 500 // 1024, LONGEST)


@pytest.mark.parametrize("shape", [(90, 70), (71, 33), (40, 200)])
def test_strips_change_nothing(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    filters = TextureFilters.fit([image], patches=500)
    whole = [features for features, _ in filters(image)]
    monkeypatch.setattr(module, "LONGEST", 24)
    assert len(module._strips(*shape)) > 2
    for one, other in zip(whole, filters(image), strict=True):
        torch.testing.assert_close(other[0], one, rtol=1e-4, atol=1e-4)


def test_a_defect_counts_as_much_in_a_larger_image() -> None:
    small = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    small[100:110, 100:110] = 9.0
    large = torch.randn(700, 900, generator=torch.Generator().manual_seed(1))
    before = score_parts([large])[0]
    large[100:356, 100:356] = small
    (of_small, *others), of_large = score_parts([small]), score_parts([large])[0]
    assert np.isnan(others).all() and len(others) == LEVELS - 1
    assert before < 3 and of_small == pytest.approx(float(small.flatten().topk(round(0.005 * 256**2)).values.mean()))
    assert of_large == pytest.approx(of_small, abs=0.6)  # windows overlap: at least half of a window is the same
    whole = float(large.flatten().topk(round(0.005 * large.numel())).values.mean())
    assert whole < of_large - 1


def test_fine_defects_are_found(model: TextureModel) -> None:
    assert model.size == model.longest == SIDE and model.map_size == LONGEST
    good, shapes = weave(3, 1), [SHAPE] * 3
    normal, found = model.predict(good, shapes), model.predict(with_missing_threads(good), shapes)
    assert found.scores.min() > normal.scores.max() and found.anomaly_maps.shape == (3, LONGEST, LONGEST)
    for one in found.anomaly_maps:
        row, column = np.unravel_index(one.argmax(), one.shape)
        assert abs(row * SIDE / LONGEST - 312) < 30 and abs(column * SIDE / LONGEST - 406) < 15


def test_files(model: TextureModel, tmp_path: Path) -> None:
    model.save(tmp_path / "m.safetensors")
    loaded = load_inspection(tmp_path / "m.safetensors")
    pixels = weave(1, 2)
    assert isinstance(loaded, TextureModel) and loaded.longest == SIDE
    expected, found = model.predict(pixels, [SHAPE]), loaded.predict(pixels, [SHAPE])
    assert (found.scores == expected.scores).all() and (found.anomaly_maps == expected.anomaly_maps).all()
