"""Sampling images from a trained model: ``fastmaf sample``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

import fastmaf
from fastmaf.capsule.models import Model
from fastmaf.images.dataset import to_images
from fastmaf.images.png import save_grid, save_png
from fastmaf.images.progress import note, track
from fastmaf.io.marks import GRID, SAMPLE, role_of
from fastmaf.io.outputs import Output, check_outputs, picture

SAMPLES_FOLDER, GRID_FILE = "samples", "samples.png"
_BATCH = 64


@dataclass(frozen=True)
class SampleResult:
    """The files of the samples, their grid picture, and the seconds that sampling took, without writing files."""

    files: list[Path]
    grid: Path
    seconds: float


@fastmaf.torch_defaults()
@torch.no_grad()
def sample(model: Model, out: str | Path, n: int = 5, *, seed: int = 0, progress: bool = True) -> SampleResult:
    """Samples ``n`` images into ``out/samples/``, and writes a grid picture of all.

    Samples of an earlier call are replaced or deleted; other files in the folder are kept.

    Args:
        model: a trained model.
        out: folder to write to.
        n: number of samples.
        seed: seed of the samples.
        progress: show a progress bar.

    Raises:
        ValueError: ``n`` is less than 1.
        OutputError: a sample or the grid would replace a file that is neither.
        fastmaf.NotInvertibleError: the model was trained with the leaky masks of the published run.
    """
    if n < 1:
        raise ValueError(f"the number of samples must be at least 1; found {n}")
    outputs = outputs_of(Path(out), n)
    check_outputs(outputs, [model.path])
    files = [output.path for output in outputs[1:]]
    # The first call of an op loads parts of torch: an empty batch keeps that out of the measured time. It also gives
    # the device, as a whitening alone has no parameters.
    device = model.flow.sample(0).device
    generator = torch.Generator(device).manual_seed(seed)
    began, parts = time.perf_counter(), []
    for start in track(range(0, n, _BATCH), "sampling", "batch", show=progress):
        parts.append(model.flow.sample(min(_BATCH, n - start), generator=generator).cpu())
    seconds = time.perf_counter() - began
    x = torch.cat(parts)
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x).all(dim=1)).sum())
        note(f"{bad} of {n} samples hold values that are not finite (shown black)")
    images = to_images(x, model.size).numpy()
    folder = Path(out) / SAMPLES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for stale in set(folder.glob("[0-9]*.png")) - set(files):
        if role_of(stale) == SAMPLE:
            stale.unlink()  # from an earlier call with more samples
    for file, image in zip(files, images, strict=True):
        save_png(file, image)
    save_grid(Path(out) / GRID_FILE, images)
    return SampleResult(files, Path(out) / GRID_FILE, seconds)


def outputs_of(out: Path, n: int) -> list[Output]:
    """Returns the files that ``sample`` writes: the grid, then the samples."""
    samples = picture(SAMPLE, "a sample")
    files = [out / SAMPLES_FOLDER / f"{i:03d}.png" for i in range(n)]
    return [Output(out / GRID_FILE, picture(GRID, "a picture of all samples")), *(Output(f, samples) for f in files)]
