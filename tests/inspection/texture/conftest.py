"""A small texture, and a texture model fitted to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from fastmaf.inspection.out_of_fold import k_fold
from fastmaf.inspection.texture.candidate import TextureCandidate
from fastmaf.inspection.texture.fit import fit_texture

SIDE, IMAGES = 48, 24
SHAPES = [(48, 48), (64, 40)] * (IMAGES // 2)


def grain(n: int, seed: int) -> torch.Tensor:
    """Images of horizontal grain, in changing light."""
    rng = np.random.default_rng(seed)
    fields = np.stack([gaussian_filter(rng.standard_normal((SIDE, SIDE)), (0.6, 4), mode="wrap") for _ in range(n)])
    values = rng.uniform(90, 150, (n, 1, 1)) + 20 * fields / fields.std()
    pixels = torch.from_numpy(np.clip(values, 0, 255).astype(np.uint8))
    return pixels[:, None].expand(-1, 3, -1, -1).contiguous()


@pytest.fixture(scope="session")
def texture() -> torch.Tensor:
    return grain(IMAGES, 0)


@pytest.fixture(scope="session")
def candidate(texture: torch.Tensor) -> TextureCandidate:
    return fit_texture(texture, k_fold(IMAGES, 2), shapes=SHAPES)
