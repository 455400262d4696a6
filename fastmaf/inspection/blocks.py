"""The local blocks of a fit: their training, and whether they are kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.cross import held_out, without
from fastmaf.inspection.recipe import Recipe


@dataclass(frozen=True, eq=False)
class BlocksFound:
    """Whether blocks are kept and why.

    Attributes:
        flows: the flow without each fold, with the blocks that are kept.
        kept: how many blocks those are.
        nll_alone: NLL of each image by the whitening that has not seen it, float64 ``[n]`` nats.
        nll: the same by the flow that is kept.
        nll_with: mean NLL with the blocks that were trained, kept or not; None where none were.
        log: their training curve, rows of step and NLLs.
    """

    flows: list[fastmaf.Flow]
    kept: int
    nll_alone: Tensor
    nll: Tensor
    nll_with: float | None
    log: list[dict[str, float]]


def choose_blocks(
    x: Tensor,
    z: Tensor,
    folds: Sequence[np.ndarray],
    flows: Sequence[fastmaf.Flow],
    recipe: Recipe,
    done: Callable[[], object] = lambda: None,
) -> BlocksFound:
    """Trains blocks without each fold, and leaves them out where held-out images are no likelier with them.

    Args:
        x: normals ``[n, D]``, as the NLL is of.
        z: whitened by the model of the fold that left each out ``[n, D]``.
        folds: indices of the images of each fold.
        flows: the whitening without each fold, and what comes before it.
        recipe: a number of blocks is kept whatever comes of it, ``"auto"`` is not.
        done: called after each fold.

    Warns:
        UserWarning: held-out images are no likelier with the blocks that the recipe asks for.
    """
    alone = held_out([x], flows, folds, lambda found: found.nll)[0]
    log: list[dict[str, float]] = []
    if not recipe.most_blocks:
        return BlocksFound(list(flows), 0, alone, alone, None, log)
    extended: list[fastmaf.Flow] = []
    for fold, flow in zip(folds, flows, strict=True):
        own = fit_blocks(without(z, fold), recipe, z[fold], None if extended else log)
        extended.append(fastmaf.Flow(recipe.features, [*flow.transforms, *own]).eval())  # type: ignore[list-item]
        done()
    nll = held_out([x], extended, folds, lambda found: found.nll)[0]
    mean, without_them = float(nll.mean()), float(alone.mean())
    better = mean < without_them  # which NaN is not
    if recipe.blocks == "auto" and not better:
        return BlocksFound(list(flows), 0, alone, alone, mean, log)
    if not better:
        warnings.warn(
            f"blocks={recipe.blocks} do not make held-out images likelier: an NLL of {mean:,.0f} nats with them, "
            f"{without_them:,.0f} without; they were asked for and kept; blocks='auto' leaves them out",
            stacklevel=4,
        )
    return BlocksFound(extended, recipe.most_blocks, alone, nll, mean, log)


def fit_blocks(
    z: Tensor, recipe: Recipe, held_out: Tensor | None = None, log: list[dict[str, float]] | None = None
) -> list[fastmaf.Transform]:
    """Trains blocks on whitened terms ``[n, D]``; with a log, writes the NLL of a batch and of ``held_out`` into it."""
    generator = torch.Generator().manual_seed(recipe.seed)
    shape = (3, recipe.size, recipe.size)
    blocks: list[fastmaf.Transform] = [
        fastmaf.LocalAutoregressive(
            shape,
            patch=recipe.patch,
            kernel=recipe.kernel,
            hidden=recipe.hidden,
            reverse=bool(i % 2),
            generator=generator,
        )
        for i in range(recipe.most_blocks)
    ]
    if not blocks:
        return blocks
    flow = fastmaf.Flow(recipe.features, blocks)
    optimizer = torch.optim.Adam(flow.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps)
    for step in range(1, recipe.steps + 1):
        batch = z[torch.randint(len(z), (min(recipe.batch_size, len(z)),), generator=generator)]
        loss = -flow.log_prob(batch).mean() / recipe.features
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)  # one odd image may not throw the weights away
        optimizer.step()
        schedule.step()
        if log is not None and held_out is not None and (step % 10 == 0 or step == 1):
            with torch.no_grad():
                seen, unseen = (float(-flow.log_prob(part).double().mean()) for part in (batch, held_out))
            log.append({"step": step, "nll": seen, "held_out_nll": unseen})
    return blocks
