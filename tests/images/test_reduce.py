"""Reduction of images by exact averages over areas."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from fastmaf.images.reduce import area_weights, reduced


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_whole_factors_are_means_of_whole_pixels_rounded_half_up(factor: int) -> None:
    pixels = noise(5, 3, 8 * factor, 8 * factor)
    sums = pixels.unfold(2, factor, factor).unfold(3, factor, factor).long().sum(dim=(4, 5))
    expected = (2 * sums + factor**2) // (2 * factor**2)
    assert torch.equal(reduced(pixels, 8), expected.to(torch.uint8))


@pytest.mark.parametrize(("side", "size"), [(3, 2), (12, 8), (5, 1), (7, 6), (300, 200)])
def test_other_factors_weight_pixels_by_their_share(side: int, size: int) -> None:
    weights, total = area_weights(side, size)
    ratio = Fraction(side, size)
    assert total == ratio.numerator**2 and bool((weights.sum(dim=1) == ratio.numerator).all())
    for i in (0, size // 2, size - 1):
        for j in range(side):
            share = max(Fraction(0), min(ratio * (i + 1), Fraction(j + 1)) - max(ratio * i, Fraction(j)))
            assert int(weights[i, j]) == share * ratio.denominator
    pixels = noise(1, 3, side, side)
    sums = (weights.double() @ pixels.double() @ weights.T.double()).long()
    assert torch.equal(reduced(pixels, size), ((2 * sums + total) // (2 * total)).to(torch.uint8))


def test_constant_images_stay_as_they_are_and_the_same_size_is_no_copy() -> None:
    white = torch.full((2, 3, 10, 10), 255, dtype=torch.uint8)
    assert bool((reduced(white, 7) == 255).all())
    assert reduced(white, 10) is white and reduced(white[:0], 5).shape == (0, 3, 5, 5)


def test_unsuitable_images_are_refused() -> None:
    for pixels in (noise(3, 4, 5), noise(3, 4, 4).float(), noise(3, 4, 4)):
        with pytest.raises(ValueError, match=r"pixels must be uint8 \[..., s, s\] with s of at least 5; found"):
            reduced(pixels, 5)
