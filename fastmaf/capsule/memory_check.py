"""Whether a training run fits into memory, checked before anything large is allocated."""

from __future__ import annotations

import bisect
import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import fastmaf
from fastmaf.capsule.config import TrainConfig
from fastmaf.io.run_folder import DoesNotFitError, format_bytes
from fastmaf.training.available_memory import available_memory
from fastmaf.training.workspace import allocate_work_buffers

# Covers what the estimate does not include: images, validation batches, the curve, fragmentation.
_RESERVE = 1.05


def check_fits(
    config: TrainConfig, device: torch.device, *, images: int, resume: bool = False, shards: int = 1
) -> None:
    """Checks that a run fits into memory; does nothing if the available memory is unknown.

    Args:
        config: the settings of the run.
        device: where it trains.
        images: number of images to train on, which limits the batch size.
        resume: whether the run continues from a checkpoint.
        shards: among how many processes the optimiser's moments are split.

    Raises:
        DoesNotFitError: it does not fit; the message names the largest batch size that fits or, if not even one image
            does, the largest number of blocks.
    """
    config = dataclasses.replace(config, batch_size=min(config.batch_size, images))
    available, needed = available_memory(device), needed_memory(config, device, shards)
    if available is not None and needed <= available:
        # The estimate does not include the buffers of the BLAS library: they are allocated here, before looking again.
        allocate_work_buffers(_planned(config), config.batch_size, device=device)
        available = available_memory(device)
    if available is None or needed <= available:
        return
    hidden = ",".join(map(str, config.hidden_features))
    advice = _advice(config, device, available, shards)
    if resume:
        advice = f"free memory, or start a new run in another --out, as --resume keeps the settings: {advice}"
    raise DoesNotFitError(
        f"training {config.blocks} blocks of {config.features:,} dimensions and hidden units {hidden} at batch size "
        f"{config.batch_size} needs about {format_bytes(needed)} on {device}, where {format_bytes(available)} are "
        f"available; {advice}"
    )


def _advice(config: TrainConfig, device: torch.device, available: int, shards: int) -> str:
    def fits(blocks: int, batch_size: int) -> bool:
        smaller = dataclasses.replace(config, blocks=blocks, batch_size=batch_size)
        return needed_memory(smaller, device, shards) <= available

    if batch := _largest(config.batch_size - 1, partial(fits, config.blocks)):
        return f"the largest batch that fits is --batch-size {batch}"
    for batch in (config.batch_size, 1):
        if blocks := _largest(config.blocks - 1, partial(fits, batch_size=batch)):
            return f"one image at a time does not fit either; at --batch-size {batch} the most is --blocks {blocks}"
    return "not even one block and one image fit: choose fewer --hidden units or a smaller --size"


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest of 1..limit that fits, or 0; everything below a number that fits must fit as well."""
    return bisect.bisect_left(range(1, limit + 1), True, key=lambda n: not fits(n))


def needed_memory(config: TrainConfig, device: torch.device, shards: int = 1) -> int:
    """Returns the bytes that a run needs on a device, with some reserve, without work buffers of libraries.

    Moments that are split count as one share on a GPU, and as a whole on a CPU: the first process gathers them there
    for a checkpoint.
    """
    update: Any = "minimize" if config.max_grad_norm is None else "clip"
    flow = _planned(config)
    estimate = fastmaf.memory_estimate(flow, config.batch_size, update=update, device=device)
    if device.type == "cuda":
        moments = 2 * sum(parameter.nbytes for parameter in flow.parameters())
        estimate -= moments - moments // shards
    return int(_RESERVE * estimate)


def _planned(config: TrainConfig) -> fastmaf.Flow:
    """Returns the flow of a run on the meta device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fastmaf.ConnectivityWarning)  # issued by the run itself
        return config.build(device="meta")


def disk_needed(config: TrainConfig) -> int:
    """Returns the bytes of a checkpoint: the model and the optimiser's two moments."""
    flow = _planned(config)
    tensors = sum(tensor.nbytes for tensor in flow.state_dict().values())
    moments = 2 * sum(parameter.nbytes for parameter in flow.parameters())
    padding = (flow.stored_weights - flow.visible_weights) * next(flow.parameters()).element_size()  # not in files
    return tensors + moments - 3 * padding
