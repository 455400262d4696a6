"""Copies of images: shifted by parts of a pixel, and turned."""

from __future__ import annotations

import pytest
import torch

from fastmaf.inspection.augment import rotated_copies, shifted_copies

SIZE = 9


def images(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 3 * SIZE**2, generator=torch.Generator().manual_seed(0))


def copies(augment: object, x: torch.Tensor) -> torch.Tensor:
    basis, weights = augment(x)  # type: ignore[operator]
    return torch.einsum("cp,npd->ncd", weights, basis).unflatten(2, (3, SIZE, SIZE))


def test_shifts_by_half_a_pixel_are_means_of_neighbours() -> None:
    x = images()
    plain = x.unflatten(1, (3, SIZE, SIZE))
    found = copies(shifted_copies(SIZE, 1, 0.5), x).unflatten(1, (3, 3))
    assert torch.allclose(found[:, 1, 1], plain)
    assert torch.allclose(found[:, 1, 2, :, :, :-1], (plain[..., :-1] + plain[..., 1:]) / 2)
    assert torch.allclose(found[:, 2, 1, :, :-1], (plain[:, :, :-1] + plain[:, :, 1:]) / 2)
    assert torch.allclose(found[:, 1, 2, :, :, -1], plain[..., -1]), "edges are repeated"


def test_quarter_turns_are_exact_and_the_others_keep_the_middle() -> None:
    x = images()
    plain = x.unflatten(1, (3, SIZE, SIZE))
    found = copies(rotated_copies(SIZE, 8), x)
    for k in range(4):
        assert torch.allclose(found[:, 2 * k], plain.rot90(-k, (2, 3)), atol=1e-5) or torch.allclose(
            found[:, 2 * k], plain.rot90(k, (2, 3)), atol=1e-5
        )
    middle = SIZE // 2
    assert torch.allclose(found[..., middle, middle], plain[:, None, :, middle, middle].expand(-1, 8, -1), atol=1e-5)
    assert torch.allclose(copies(rotated_copies(SIZE, 5), torch.full((2, 3 * SIZE**2), 0.3)), torch.tensor(0.3))


def test_turns_by_less_than_a_quarter_are_bilinear() -> None:
    """A ramp across, turned by 45°, is the ramp along the diagonal, inside the circle that stays in the picture."""
    at = torch.arange(SIZE) - SIZE // 2
    ramp = at.float().expand(3, SIZE, SIZE).reshape(1, -1)
    found = copies(rotated_copies(SIZE, 8), ramp)[0, 1, 0]
    rows, columns = torch.meshgrid(at, at, indexing="ij")
    inside = rows**2 + columns**2 < (SIZE // 2) ** 2
    expected = [(columns + sign * rows) / 2**0.5 for sign in (1, -1)]
    assert any(torch.allclose(found[inside], one[inside], atol=1e-4) for one in expected)


@pytest.mark.parametrize("make", [lambda: shifted_copies(0), lambda: rotated_copies(4, 0), lambda: rotated_copies(0)])
def test_what_makes_no_copies_is_refused(make: object) -> None:
    with pytest.raises(ValueError, match="size"):
        make()  # type: ignore[operator]
