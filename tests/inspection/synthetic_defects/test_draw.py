"""Synthetic defects: the requested kinds, masks that cover them, and the same defects from the same seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.images.dataset import load_train
from fastmaf.inspection.synthetic_defects.brushes import BRUSHES
from fastmaf.inspection.synthetic_defects.canvas import Canvas
from fastmaf.inspection.synthetic_defects.draw import KINDS, draw_defects


@pytest.fixture(scope="module")
def normals(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    root = draw_dataset(
        tmp_path_factory.mktemp("normals"), train=2 * len(KINDS) + 3, good=0, defects={}, size=64, progress=False
    )
    return load_train(root, size=64, progress=False).pixels


def differs(a: Tensor, b: Tensor) -> Tensor:
    return (a.int() - b.int()).abs().amax(dim=1)


def test_each_image_has_one_defect_and_kinds_are_balanced(normals: Tensor) -> None:
    before = normals.clone()
    drawn = draw_defects(normals, seed=3)
    assert torch.equal(normals, before)
    assert drawn.pixels.shape == normals.shape and drawn.pixels.dtype == torch.uint8 and drawn.pixels.is_contiguous()
    assert drawn.masks.shape == (len(normals), 64, 64) and drawn.masks.dtype == torch.bool
    counts = Counter(drawn.kinds)
    assert set(counts) == set(KINDS) and set(counts.values()) == {2, 3}


def test_masks_cover_what_differs_and_at_most_a_pixel_more(normals: Tensor) -> None:
    for seed in range(3):
        drawn = draw_defects(normals, seed=seed)
        seen = differs(normals, drawn.pixels) > 2
        assert seen.flatten(1).any(dim=1).all()
        assert bool((drawn.masks | ~seen).all())
        grown = torch.nn.functional.max_pool2d(seen[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
        assert bool((grown | ~drawn.masks).all())


def test_a_gap_of_a_pixel_is_closed_also_at_the_edge() -> None:
    from fastmaf.inspection.synthetic_defects.draw import _masks

    clean = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    drawn = clean.copy()
    drawn[0, 0, [0, 2], 1] = 3
    drawn[0, 4:7, [4, 6], 0] = 9
    drawn[0, 4:7, 0, 2] = 2  # too little
    covered = np.argwhere(_masks(clean, drawn)[0]).tolist()
    assert [0, 0] in covered and [0, 1] in covered and [0, 2] in covered and [5, 5] in covered
    assert [5, 0] not in covered and [7, 5] not in covered


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_local_seen_and_mixed_in_strength(normals: Tensor, kind: str) -> None:
    drawn = draw_defects(normals, kinds=(kind,), seed=1)
    assert drawn.kinds == (kind,) * len(normals)
    strongest = differs(normals, drawn.pixels).flatten(1).amax(dim=1).float()
    assert float(strongest.min()) >= 4
    assert float(strongest.max()) >= 2 * float(strongest.min())
    areas = drawn.masks.flatten(1).sum(dim=1)
    assert int(areas.min()) >= 3 and int(areas.max()) < 0.35 * 64 * 64
    assert len(areas.unique()) > len(normals) / 3


def test_most_defects_lie_on_the_object(normals: Tensor) -> None:
    drawn = [draw_defects(normals, seed=seed) for seed in range(4)]
    images = normals.permute(0, 2, 3, 1).numpy().astype(np.float32)
    inside = np.stack([Canvas(image, image, np.random.default_rng(0), 1.0).object for image in images])
    assert 0.15 < inside.mean() < 0.45  # the capsule, not the background
    share = np.mean([[(mask.numpy() & on).any() for mask, on in zip(d.masks, inside, strict=True)] for d in drawn])
    assert share > 0.85


def test_the_same_seed_draws_the_same_and_another_something_else(normals: Tensor) -> None:
    first, again, other = (draw_defects(normals, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.masks, again.masks)
    assert first.kinds == again.kinds
    assert first.kinds != other.kinds
    assert all(not torch.equal(a, b) for a, b in zip(first.pixels, other.pixels, strict=True))
    torch.manual_seed(0)
    np.random.seed(0)
    assert torch.equal(draw_defects(normals, seed=5).pixels, first.pixels)  # no global generator takes part


def test_lengths_grow_with_the_image(normals: Tensor) -> None:
    large = normals.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    for kind in ("scratch", "stain", "dent"):
        areas = [
            float(draw_defects(x, kinds=(kind,), seed=2).masks.float().mean(dim=(1, 2)).median())
            for x in (normals, large)
        ]
        assert 0.4 < areas[1] / areas[0] < 2.5, kind


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (127, 127, 127), (255, 0, 0)])
@pytest.mark.parametrize("size", [8, 17, 64])
def test_images_without_structure_get_what_shows_there(colour: tuple[int, int, int], size: int) -> None:
    flat = torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(len(KINDS), 3, size, size)
    drawn = draw_defects(flat)
    assert bool(drawn.masks.flatten(1).any(dim=1).all())
    moved = {"erased", "pasted", "smear", "dent"}
    assert not moved & set(drawn.kinds) and "spot" in drawn.kinds


def test_one_image_and_none() -> None:
    noise = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert draw_defects(noise).masks.any()
    none = draw_defects(noise[:0])
    assert none.pixels.shape == (0, 3, 20, 20) and none.masks.shape == (0, 20, 20) and none.kinds == ()


@pytest.mark.parametrize("kind", KINDS)
def test_defects_at_the_corners_are_cut_off_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).uniform(0, 255, (33, 33, 3)).astype(np.float32)
    for corner in ((0.0, 0.0), (33.0, 33.0), (0.0, 33.0)):
        monkeypatch.setattr(Canvas, "place", lambda self, weight=None, corner=corner: corner)
        for seed in range(5):
            changed = BRUSHES[kind](Canvas(image, image, np.random.default_rng(seed), 3.0))
            assert changed.shape == image.shape and np.isfinite(changed).all()


def test_arguments_are_checked() -> None:
    good = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    for pixels in (good.float(), good[:, :1], good[..., :7], good[0], torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="pixels must be"):
            draw_defects(pixels)
    with pytest.raises(ValueError, match="scratch.*found hole"):
        draw_defects(good, kinds=("spot", "hole"))
    with pytest.raises(ValueError, match="found none"):
        draw_defects(good, kinds=())
    with pytest.raises(ValueError, match="seed"):
        draw_defects(good, seed=-1)
