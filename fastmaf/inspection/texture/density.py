"""The density of the features of a location: a Gaussian whitening and, where held-out features say so, MAF blocks.

The blocks are conditioned on light and position; see ``fastmaf.inspection.texture.light``.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastmaf
from fastmaf.transforms.fallback import without_warning

_BLOCKS = 3
_HIDDEN = 64
_STEPS = 300
_BATCH = 128, 2048  # the least and the most
_BATCHES = 64  # that the features are divided into, between these
_LR = 3e-3
_FLOOR = 1e-4  # of the variance of the noise of a feature
_WHITENED_ON = 50_000
_ROWS = 2**15  # features that are evaluated at once


def fit_whitening(rows: Tensor, seed: int = 0) -> fastmaf.GaussianWhitening:
    """Returns a whitening fitted to features ``[n, D]``."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(rows), generator=generator)[:_WHITENED_ON]
    features = rows.shape[1]
    return fastmaf.GaussianWhitening(features, features).fit_(rows[index], floor=_FLOOR, seed=seed)


@without_warning()
def fit_blocks(rows: Tensor, contexts: Tensor, whitening: fastmaf.GaussianWhitening, seed: int = 0) -> fastmaf.Flow:
    """Returns a whitening and MAF blocks that are trained on features ``[n, D]``, given contexts ``[n, C]``."""
    features = rows.shape[1]
    maf = fastmaf.MAF(features, _BLOCKS, _HIDDEN, context_features=contexts.shape[1], init="identity", seed=seed)
    optimizer = fastmaf.optim.FusedAdam(maf.parameters(), lr=_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=_STEPS)
    step = fastmaf.TrainingStep(maf, optimizer)
    generator = torch.Generator().manual_seed(seed)
    size = min(max(len(rows) // _BATCHES, _BATCH[0]), _BATCH[1])
    for _ in range(_STEPS):
        index = torch.randint(len(rows), (size,), generator=generator)
        step(whitening(rows[index])[0], contexts[index])
        schedule.step()
    flow = fastmaf.Flow(features, [whitening, *maf.transforms])
    return flow.eval().requires_grad_(False)


def without_blocks(whitening: fastmaf.GaussianWhitening) -> fastmaf.Flow:
    """Returns a flow of a whitening alone."""
    return fastmaf.Flow(whitening.features, [whitening]).eval().requires_grad_(False)


@torch.no_grad()
def nll(flow: fastmaf.Flow, rows: Tensor, contexts: Tensor | None) -> Tensor:
    """Returns the NLL of features ``[n, D]`` in nats, float32 ``[n]``; one that overflows is the largest finite one.

    Args:
        flow: the density.
        rows: the features.
        contexts: of each, ``[n, C]``, which a flow without blocks does not use; None: there are none.
    """
    if contexts is None or not flow.context_features:
        parts = [-flow.log_prob(part) for part in rows.split(_ROWS)]
    else:
        pairs = zip(rows.split(_ROWS), contexts.split(_ROWS), strict=True)
        parts = [-flow.log_prob(part, context) for part, context in pairs]
    return torch.nan_to_num(torch.cat(parts), nan=1e30, posinf=1e30).clamp(max=1e30)
