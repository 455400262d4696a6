"""Reduction of images in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaf.images.decode import load_image
from fastmaf.images.reduce import reduced


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("size", [1, 8, 11, 15])
def test_images_are_reduced_as_files_are(size: int, tmp_path: Path) -> None:
    pixels = noise(3, 3, 16, 16)
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    expected = torch.stack([load_image(tmp_path / f"{i}.png", size)[0] for i in range(3)])
    assert torch.equal(reduced(pixels, size), expected)


def test_the_same_size_is_no_copy_and_no_images_are_none() -> None:
    pixels = noise(2, 3, 10, 10)
    assert reduced(pixels, 10) is pixels and reduced(pixels[:0], 5).shape == (0, 3, 5, 5)


def test_unsuitable_images_are_refused() -> None:
    for pixels in (noise(1, 3, 4, 5), noise(1, 3, 9, 9).float(), noise(1, 3, 4, 4), noise(1, 1, 9, 9)):
        with pytest.raises(ValueError, match=r"pixels must be uint8 \[n, 3, s, s\] with s of at least 5; found"):
            reduced(pixels, 5)
