"""Sampling images from a trained model: ``fastmaf capsule sample``."""

from __future__ import annotations

from pathlib import Path

from fastmaf.capsule.models import Model
from fastmaf.images.samples import SampleResult, write_samples


def sample(model: Model, out: str | Path, n: int = 5, *, seed: int = 0, progress: bool = True) -> SampleResult:
    """Samples ``n`` images from a trained model; see ``fastmaf.images.samples.write_samples``."""
    return write_samples(model.flow, model.size, out, n, seed=seed, inputs=[model.path], progress=progress)
