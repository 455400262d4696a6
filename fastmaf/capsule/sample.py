"""Drawing images from a trained model: ``fastmaf sample``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import fastmaf
from fastmaf.capsule.data import to_images
from fastmaf.capsule.models import Model
from fastmaf.capsule.plots import image_grid, save_png

SAMPLES_FOLDER, GRID_FILE = "samples", "samples.png"
_BATCH = 64


@dataclass(frozen=True)
class SampleResult:
    """Where the images are, and how long drawing them took in seconds (writing files aside)."""

    files: list[Path]
    grid: Path
    seconds: float


@fastmaf.torch_defaults()
@torch.no_grad()
def sample(model: Model, out: str | Path, n: int = 5, *, seed: int = 0, progress: bool = True) -> SampleResult:
    """Draws ``n`` images into ``out/samples/`` and one grid picture of them all.

    Args:
        model: a trained model.
        out: folder to write to.
        n: how many.
        seed: makes them repeatable.
        progress: show a progress bar.

    Raises:
        ValueError: ``n`` is less than 1.
        fastmaf.NotInvertibleError: the model was trained with the reference's leaky masks.
    """
    if n < 1:
        raise ValueError(f"the number of samples must be at least 1; found {n}")
    device = next(model.flow.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    # A process's first call of an op loads much of torch: an empty batch keeps that out of the time.
    model.flow.inverse(torch.zeros(0, model.flow.features, device=device))
    began, parts = time.perf_counter(), []
    for start in tqdm(range(0, n, _BATCH), desc="sampling", unit="batch", disable=not progress, leave=False):
        parts.append(model.flow.sample(min(_BATCH, n - start), generator=generator).cpu())
    seconds = time.perf_counter() - began
    x = torch.cat(parts)
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x).all(dim=1)).sum())
        tqdm.write(f"{bad} of {n} samples hold values that are not finite (shown black): the model blows up there")
    images = to_images(x, model.size).numpy()
    folder = Path(out) / SAMPLES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:03d}.png" for i in range(n)]
    for stale in set(folder.glob("[0-9]*.png")) - set(files):
        stale.unlink()  # an earlier call's, which drew more
    for file, image in zip(files, images, strict=True):
        save_png(file, image)
    image_grid(Path(out) / GRID_FILE, images)
    return SampleResult(files, Path(out) / GRID_FILE, seconds)
