"""Augmentation of images: shifts by parts of a pixel, and rotations."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import avg_pool2d

from fastmaf.images.decode import resized
from fastmaf.inspection.augmentation import Augment, blurred, matching_blur, rotations, shifts

SIZE = 9


def images(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 3 * SIZE**2, generator=torch.Generator().manual_seed(0))


def copies(augment: Augment, x: torch.Tensor) -> torch.Tensor:
    basis, weights = augment(x)
    return torch.einsum("cp,npd->ncd", weights, basis).unflatten(2, (3, SIZE, SIZE))


def test_shifts_by_half_a_pixel_are_means_of_neighbours() -> None:
    x = images()
    plain = x.unflatten(1, (3, SIZE, SIZE))
    augmented = copies(shifts(SIZE, 1, 0.5), x).unflatten(1, (3, 3))
    assert torch.allclose(augmented[:, 1, 1], plain)
    assert torch.allclose(augmented[:, 1, 2, :, :, :-1], (plain[..., :-1] + plain[..., 1:]) / 2)
    assert torch.allclose(augmented[:, 2, 1, :, :-1], (plain[:, :, :-1] + plain[:, :, 1:]) / 2)
    assert torch.allclose(augmented[:, 1, 2, :, :, -1], plain[..., -1]), "edges are repeated"


def test_quarter_turns_are_exact_and_counter_clockwise_and_the_others_keep_the_centre() -> None:
    x = images()
    plain = x.unflatten(1, (3, SIZE, SIZE))
    augmented = copies(rotations(SIZE, 8), x)
    for k in range(4):
        assert torch.allclose(augmented[:, 2 * k], plain.rot90(k, (2, 3)), atol=1e-5)
    middle = SIZE // 2
    centre = plain[:, None, :, middle, middle].expand(-1, 8, -1)
    assert torch.allclose(augmented[..., middle, middle], centre, atol=1e-5)
    assert torch.allclose(copies(rotations(SIZE, 5), torch.full((2, 3 * SIZE**2), 0.3)), torch.tensor(0.3))


def test_rotations_by_less_than_a_quarter_are_bilinear() -> None:
    """A ramp to the right, rotated by 45°, is a ramp to the upper right, inside the circle that stays in the image."""
    at = torch.arange(SIZE) - SIZE // 2
    ramp = at.float().expand(3, SIZE, SIZE).reshape(1, -1)
    augmented = copies(rotations(SIZE, 8), ramp)[0, 1, 0]
    rows, columns = torch.meshgrid(at, at, indexing="ij")
    inside = rows**2 + columns**2 < (SIZE // 2) ** 2
    assert torch.allclose(augmented[inside], ((columns - rows) / 2**0.5)[inside], atol=1e-4)


@pytest.mark.parametrize("make", [lambda: shifts(0), lambda: rotations(4, 0), lambda: rotations(0)])
def test_wrong_arguments_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="size"):
        make()  # type: ignore[operator]


def test_shifts_of_the_image_at_twice_the_size_have_true_half_pixel_phases() -> None:
    """A step by half a pixel moves the larger image by one of its pixels, before the mean over 2 x 2."""
    large = torch.randint(
        0, 256, (2, 3, 2 * SIZE, 2 * SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    values = large.float() / 255

    def means(images: torch.Tensor) -> torch.Tensor:
        return images.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))

    basis, weights = shifts(SIZE, 2, 0.5, zoom=2)(large)
    assert torch.equal(weights, torch.eye(25)), "nothing is interpolated"
    augmented = basis.unflatten(2, (3, SIZE, SIZE)).unflatten(1, (5, 5))
    assert torch.allclose(augmented[:, 2, 2], means(values))
    right = torch.cat([values[..., 1:], values[..., -1:]], dim=3)
    assert torch.allclose(augmented[:, 2, 3], means(right), atol=1e-6)
    down = torch.cat([values[:, :, :1], values[:, :, :-1]], dim=2)
    assert torch.allclose(augmented[:, 1, 2], means(down), atol=1e-6)
    whole = shifts(SIZE, 1, 1.0, zoom=2)(large)
    mixed = torch.einsum("cp,npd->ncd", whole[1], whole[0]).unflatten(1, (3, 3))
    assert torch.allclose(mixed[:, 0, 2], basis.unflatten(1, (5, 5))[:, 0, 4], atol=1e-6)


def test_rotations_of_the_image_at_twice_the_size_are_averaged_after_the_rotation() -> None:
    large = torch.rand(2, 3, 2 * SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(1))
    turned, weights = rotations(2 * SIZE, 8)(large.flatten(1))
    fine = turned.unflatten(2, (3, SIZE, 2, SIZE, 2)).mean(dim=(4, 6)).flatten(2)
    actual, same = rotations(SIZE, 8, zoom=2)(large)
    assert torch.allclose(actual, fine, atol=1e-6) and torch.equal(weights, same)


def test_the_blur_makes_averages_as_soft_as_the_images() -> None:
    """Pillow's reduction by two weighs four pixels by 1, 3, 3, 1: an average of two, after a blur by 1/4."""
    generator = torch.Generator().manual_seed(2)
    double = torch.randint(0, 256, (5, 3, 2 * SIZE, 2 * SIZE), dtype=torch.uint8, generator=generator)
    pixels = torch.stack([resized(image.permute(1, 2, 0).contiguous().numpy(), SIZE) for image in double])
    share = matching_blur(pixels.flatten(1) / 255, double)
    assert share == pytest.approx(0.25, abs=0.03)
    averages = avg_pool2d(blurred(double / 255, 0.25), 2)
    inside = (..., slice(1, -1), slice(1, -1))
    assert torch.allclose(averages[inside], pixels[inside] / 255, atol=1.5 / 255), "rounded twice to 8 bits"
    assert matching_blur(avg_pool2d(double / 255, 2).flatten(1), double) == 0
