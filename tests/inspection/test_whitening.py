"""Augmentation of images: shifts by parts of a pixel, and rotations."""

from __future__ import annotations

import pytest
import torch

from fastmaf.inspection.whitening import Augment, rotations, shifts

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
