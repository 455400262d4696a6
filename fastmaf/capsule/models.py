"""Trained models of the capsule commands: the flow, the size of its images, and its held-out images."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

import fastmaf
from fastmaf.images.dataset import ImageSet, check_takes_images, to_unit
from fastmaf.images.progress import track
from fastmaf.training.checkpoints import MODEL_FILE, training_in


@dataclass(frozen=True)
class Model:
    """A flow over square RGB images.

    Attributes:
        flow: the flow, with D = 3 size².
        size: side of its images in pixels.
        path: the file it was loaded from.
        held_out: names of the good images that were held out of training; empty if unknown.
    """

    flow: fastmaf.Flow
    size: int
    path: Path
    held_out: tuple[str, ...]


@fastmaf.torch_defaults()
def load_model(path: str | Path, *, device: str = "cpu") -> Model:
    """Loads a model from a file or from the folder of a run.

    Raises:
        FileNotFoundError: the file does not exist.
        fastmaf.CheckpointError: it is not a model of square RGB images.
    """
    path = Path(path)
    if path.is_dir():
        path = path / MODEL_FILE
    flow, metadata, _ = fastmaf.load_with_extras(path, device=device)
    size = check_takes_images(flow, path)
    flow.validate_args = False  # NLLs that are not finite are reported, not refused
    return Model(flow.eval(), size, path, tuple(training_in(metadata, path).get("held_out", ())))


@fastmaf.torch_defaults()
@torch.no_grad()
def nll_of(flow: fastmaf.Flow, images: ImageSet, *, batch_size: int = 64, progress: bool = True) -> np.ndarray:
    """Returns the negative log-likelihood of each image, float64 ``[n]`` nats."""
    device = next(chain(flow.parameters(), flow.buffers()), torch.empty(0)).device
    parts = torch.arange(len(images)).split(batch_size)
    bar = track(parts, "scoring", "batch", show=progress)
    log_prob = fastmaf.ReplayedLogProb(flow)
    scores = [-log_prob(to_unit(images.pixels[part]).to(device)).cpu().double() for part in bar]
    return torch.cat(scores).numpy() if scores else np.empty(0)
