"""Filters and features of textures."""

from __future__ import annotations

import pytest
import torch

from fastmaf.inspection.texture.alignment import alignment
from fastmaf.inspection.texture.features import LEVELS, LONGEST, TextureFilters, pyramid, to_texture


def noise(n: int, side: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, side, side), generator=generator, dtype=torch.uint8).expand(-1, 3, -1, -1)


def test_responses_have_unit_variance_and_follow_a_shift_of_the_image() -> None:
    images = [to_texture(image, None, 1) for image in noise(6, 64)]
    filters = TextureFilters.fit(images)
    level = torch.stack([next(filters(image))[0] for image in images])
    count = filters.features // 2
    responses = level[:, :count, 2:-2, 2:-2]
    torch.testing.assert_close(responses.var(dim=(0, 2, 3)), torch.ones(count), rtol=0.2, atol=0)
    shifted = torch.roll(images[0], (-4, -6), dims=(1, 2))
    (here, _), (there, _) = next(filters(images[0])), next(filters(shifted))
    torch.testing.assert_close(there[:, 8:16, 8:16], here[:, 10:18, 11:19])  # every second pixel is a location


def test_a_pyramid_ends_where_a_level_would_be_too_small() -> None:
    assert [tuple(x.shape[1:]) for x in pyramid(torch.zeros(1, 256, 160))] == [
        (256, 160),
        (128, 80),
        (64, 40),
        (32, 20),
    ]
    assert len(list(pyramid(torch.zeros(1, 31, 400)))) == 1 and len(list(pyramid(torch.zeros(1, 999, 999)))) == LEVELS
    flat = list(pyramid(torch.full((3, 64, 64), 0.25)))
    assert all(torch.allclose(x, torch.tensor(0.25)) for x in flat)


@pytest.mark.parametrize(("shape", "expected"), [((300, 115), (300, 115)), ((2 * LONGEST, 400), (LONGEST, 200))])
def test_images_are_seen_at_their_own_aspect_ratio(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    image = to_texture(noise(1, 64)[0], shape, 1)
    assert image.shape == (1, *expected) and 0 <= float(image.min()) < float(image.max()) <= 1
    assert to_texture(noise(1, 64)[0], None, 3).shape == (3, 64, 64)


def test_alignment_tells_common_structure_from_texture() -> None:
    texture = noise(20, 32)
    assert alignment(texture) == pytest.approx(-1 / 19, abs=0.03)  # chance: of the mean of 19 others
    aligned = texture[:1].int() * 3 // 4 + texture.int() // 4
    assert alignment(aligned.to(torch.uint8)) > 0.8
    assert alignment(torch.zeros(3, 3, 16, 16, dtype=torch.uint8)) == 1.0
    x = (texture[:5, 0, 1:-1, 1:-1].double()) - torch.nn.functional.avg_pool2d(texture[:5, :1].double(), 3, 1)[:, 0]
    others = torch.stack([torch.cat([x[:i], x[i + 1 :]]).mean(dim=0) for i in range(5)])
    expected = 1 - float((x - others).square().sum() / x.square().sum())
    assert alignment(texture[:5]) == pytest.approx(expected, abs=1e-9)
