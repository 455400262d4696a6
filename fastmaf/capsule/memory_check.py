"""Whether a training run fits into memory, checked before anything large is allocated."""

from __future__ import annotations

import bisect
import dataclasses
import warnings
from collections.abc import Callable
from functools import partial

import torch

import fastmaf
from fastmaf.capsule.config import TrainConfig
from fastmaf.io.run_folder import DoesNotFitError, format_bytes
from fastmaf.training.available_memory import available_memory

# For what the estimate leaves out or misjudges: the images, batches to validate on, the curve, the allocator's gaps.
_RESERVE = 1.05


def check_fits(config: TrainConfig, device: torch.device, *, images: int, resume: bool = False) -> None:
    """Refuses a run that will not fit.

    Where it cannot be found out what is available, nothing is refused.

    Args:
        config: of the run.
        device: where it trains.
        images: how many there are to train on: no batch is larger.
        resume: it goes on from a checkpoint.

    Raises:
        DoesNotFitError: with the largest batch size that fits, or, where even one image does not, the largest number of
            blocks.
    """
    config = dataclasses.replace(config, batch_size=min(config.batch_size, images))
    available, needed = available_memory(device), needed_memory(config, device)
    if available is not None and needed <= available:
        # The estimate leaves out the buffers of the BLAS library: those are allocated now, and no longer available.
        fastmaf.allocate_work_buffers(_planned(config), config.batch_size, device=device)
        available = available_memory(device)
    if available is None or needed <= available:
        return
    hidden = ",".join(map(str, config.hidden_features))
    advice = _advice(config, device, available)
    if resume:
        advice = f"free memory, or start a new run in another --out, as --resume keeps the settings: {advice}"
    raise DoesNotFitError(
        f"training {config.blocks} blocks of {config.features:,} dimensions and hidden units {hidden} at batch size "
        f"{config.batch_size} needs about {format_bytes(needed)} on {device}, where {format_bytes(available)} are "
        f"available; {advice}"
    )


def _advice(config: TrainConfig, device: torch.device, available: int) -> str:
    def fits(blocks: int, batch_size: int) -> bool:
        smaller = dataclasses.replace(config, blocks=blocks, batch_size=batch_size)
        return needed_memory(smaller, device) <= available

    if batch := _largest(config.batch_size - 1, partial(fits, config.blocks)):
        return f"the largest batch that fits is --batch-size {batch}"
    for batch in (config.batch_size, 1):
        if blocks := _largest(config.blocks - 1, partial(fits, batch_size=batch)):
            return f"one image at a time does not fit either; at --batch-size {batch} the most is --blocks {blocks}"
    return "not even one block and one image fit: choose fewer --hidden units or a smaller --size"


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest number of 1..limit that fits, 0 if none does; what fits goes on fitting when smaller."""
    return bisect.bisect_left(range(1, limit + 1), True, key=lambda n: not fits(n))


def needed_memory(config: TrainConfig, device: torch.device) -> int:
    """Returns the bytes that a run will take on a device, with some reserve, aside from libraries' work buffers."""
    clips = config.max_grad_norm is not None
    estimate = fastmaf.memory_estimate(
        _planned(config), config.batch_size, update="clip" if clips else "minimize", device=device
    )
    return int(_RESERVE * estimate)


def _planned(config: TrainConfig) -> fastmaf.Flow:
    """Returns the flow of a run without its numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastmaf.ConnectivityWarning)  # it will come with the run itself
        return config.build(device="meta")


def disk_needed(config: TrainConfig) -> int:
    """Returns the bytes of a checkpoint, model and the optimiser's two moments: written before the last one goes."""
    flow = _planned(config)
    weights = sum(tensor.nbytes for tensor in flow.state_dict().values())
    return weights + 2 * sum(parameter.nbytes for parameter in flow.parameters())
