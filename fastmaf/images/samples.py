"""Samples of a flow over images as pictures: one PNG each, and a grid of all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastmaf
from fastmaf.images.dataset import to_images
from fastmaf.images.png import save_grid, save_png
from fastmaf.images.progress import note, track
from fastmaf.io.marks import GRID, SAMPLE, role_of
from fastmaf.io.outputs import Output, check_outputs, picture
from fastmaf.io.wording import count

SAMPLES_FOLDER, GRID_FILE = "samples", "samples.png"
_BATCH = 5  # always: a sample is the same, to the bit, however many are drawn


@dataclass(frozen=True)
class SampleResult:
    """The files of the samples, their grid picture, and the seconds that sampling took, without writing files."""

    files: list[Path]
    grid: Path
    seconds: float

    def describe(self) -> str:
        """Returns the number of samples, the time and the files as text."""
        n, folder = count(len(self.files), "sample"), self.files[0].parent
        return f"{n} in {self.seconds:.2f} s: {folder}; all in one picture: {self.grid}"

    def summary(self) -> dict[str, Any]:
        """Returns the files and the seconds, as JSON types."""
        return {"samples": [str(file) for file in self.files], "grid": str(self.grid), "seconds": self.seconds}


@fastmaf.torch_defaults()
@torch.no_grad()
def write_samples(
    flow: fastmaf.Flow,
    size: int,
    out: str | Path,
    n: int = 5,
    *,
    seed: int = 0,
    inputs: Sequence[Path] = (),
    progress: bool = True,
) -> SampleResult:
    """Samples ``n`` images into ``out/samples/``, and writes a grid picture of all.

    Values beyond [0, 1] are clipped. Samples of an earlier call are replaced or deleted; other files in the folder are
    kept.

    Args:
        flow: a flow of D = 3 size² dimensions.
        size: side of the images in pixels.
        out: folder to write to.
        n: number of samples.
        seed: seed of the samples; sample i is the same whatever ``n`` is.
        inputs: files that must not be replaced, such as that of the model.
        progress: show a progress bar.

    Raises:
        ValueError: ``n`` is less than 1.
        OutputError: a sample or the grid would replace a file that is neither.
        fastmaf.NotInvertibleError: the flow has the leaky masks of the published run.
    """
    if n < 1:
        raise ValueError(f"the number of samples must be at least 1; found {n}")
    outputs = outputs_of(Path(out), n)
    check_outputs(outputs, inputs)
    files = [output.path for output in outputs[1:]]
    flow.sample(0)  # the first call of an op loads parts of torch, which is not to be measured
    began, parts = time.perf_counter(), []
    for start in track(range(0, n, _BATCH), "sampling", "batch", show=progress):
        parts.append(flow.sample(_BATCH, seed=seed, start=start).cpu())
    seconds = time.perf_counter() - began
    x = torch.cat(parts)[:n]
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x).all(dim=1)).sum())
        note(f"{bad} of {n} samples hold values that are not finite (shown black)")
    images = to_images(x, size).numpy()
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
    """Returns the files that ``write_samples`` writes: the grid, then the samples."""
    samples = picture(SAMPLE, "a sample")
    files = [out / SAMPLES_FOLDER / f"{i:03d}.png" for i in range(n)]
    return [Output(out / GRID_FILE, picture(GRID, "a picture of all samples")), *(Output(f, samples) for f in files)]
