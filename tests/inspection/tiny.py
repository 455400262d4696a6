"""Recipes, images and calibrations that several tests use."""

from __future__ import annotations

import numpy as np
import torch

from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings

TINY = Recipe(
    size=16, rank=10, blocks=1, steps=5, batch_size=4, folds=3, score=ScoreSettings(), map_config=AnomalyMapConfig()
)

FIXED = Recipe(size=16, score=ScoreSettings(), map_config=AnomalyMapConfig())
"""The default recipe for images of 16 pixels, without selecting a score or a map."""


def silent(_: str) -> None: ...


def waves(n: int, seed: int = 0) -> torch.Tensor:
    """Images of a wave in changing light, which the whitening explains completely."""
    rng = np.random.default_rng(seed)
    wave = 128 + 40 * np.sin(np.linspace(0, 6, 16))[None, :, None]
    pixels = wave + rng.normal(0, 10, (n, 1, 1, 1)) + rng.normal(0, 4, (n, 16, 16, 3))
    return torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def calibration_of(n: int, alpha: float = 0.05, confidence: float | None = None) -> Calibration:
    """A calibration on the scores 1..n, so that the threshold is the rank."""
    return Calibration(np.arange(1.0, n + 1), alpha, confidence, "split")


A_REPORT = '<meta name="generator" content="fastmaf tests">'
"""What passes for a report of this software."""
