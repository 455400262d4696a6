"""The local autoregressive blocks of a flow: training them, and dropping them if they do not help."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.out_of_fold import OutOfFoldModels, drop_fold
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.float64_flow import FlowValues
from fastmaf.training.callbacks import Callback

Log = list[dict[str, float]]


def fit_blocks(
    z: Tensor,
    recipe: Recipe,
    held_out: Tensor | None = None,
    log: Log | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[fastmaf.Transform]:
    """Returns blocks trained on whitened images ``[n, D]``.

    Args:
        z: whitened images.
        recipe: the settings.
        held_out: whitened images to evaluate on.
        log: if given with ``held_out``, receives rows of step and the NLLs of the batch and of ``held_out``.
        callbacks: called with each row.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    shape = (recipe.features // recipe.size**2, recipe.size, recipe.size)
    options = {"patch": recipe.patch, "kernel": recipe.kernel, "hidden": recipe.hidden}
    blocks: list[fastmaf.Transform] = [
        fastmaf.LocalAutoregressive(shape, **options, reverse=bool(i % 2), generator=generator)
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
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)  # one unusual image must not destroy the weights
        optimizer.step()
        schedule.step()
        if log is not None and held_out is not None and (step % 10 == 0 or step == 1):
            with torch.no_grad():
                train, test = (float(-flow.log_prob(part).double().mean()) for part in (batch, held_out))
            log.append({"step": step, "nll": train, "held_out_nll": test})
            for callback in callbacks:
                callback(step, {"nll": train, "held_out_nll": test})
    return blocks


def select_blocks(
    x: Tensor,
    z: Tensor,
    models: OutOfFoldModels,
    recipe: Recipe,
    done: Callable[[], object],
    callbacks: Sequence[Callback] = (),
) -> tuple[int, OutOfFoldModels, Log, dict[str, Any]]:
    """Trains blocks without each fold, and drops them if held-out images are no more likely with them.

    With ``blocks="auto"`` the first fold is tried alone: if its images are no more likely with blocks, none are trained
    without the others, and the mean NLL with blocks is that without, plus the difference over this fold.

    Args:
        x: good images ``[n, D]``, as their NLL is measured.
        z: the same, each whitened by the model of the fold that left it out ``[n, D]``.
        models: the whitenings fitted without each fold, with the transforms before them.
        recipe: a number of blocks is kept in any case, ``"auto"`` is not.
        done: called after each fold.
        callbacks: called with the rows of the training curve.

    Returns:
        The number of blocks kept; ``models`` with these blocks; the training curve of the first fold, rows of step
        and NLLs; and the mean held-out NLLs in nats that decided, for the model's record.

    Warns:
        UserWarning: held-out images are no more likely with the blocks that the recipe asks for.
    """
    nll, mean_with = models.nll(x), None
    mean, kept = float(nll.mean()), recipe.most_blocks
    log: Log = []
    flows: list[fastmaf.Flow] = []
    for fold, flow in zip(models.folds if kept else (), models.flows, strict=False):
        blocks = fit_blocks(drop_fold(z, fold), recipe, z[fold], None if flows else log, callbacks)
        flows.append(fastmaf.Flow(recipe.features, [*flow.transforms, *blocks]).eval())  # type: ignore[list-item]
        done()
        if len(flows) == 1 and recipe.blocks == "auto":
            # Most of the time is saved where the first fold shows that blocks do not help.
            first = float(FlowValues(flows[0], x[fold]).nll.mean())
            if not first < float(nll[fold].mean()):
                kept, mean_with = 0, mean - float(nll[fold].mean()) + first
                break
    if kept:
        extended = OutOfFoldModels(models.folds, flows)
        nll_with = extended.nll(x)
        mean_with = float(nll_with.mean())
        better = mean_with < mean  # False for NaN
        if recipe.blocks != "auto" and not better:
            warnings.warn(
                f"blocks={recipe.blocks} do not make held-out images more likely (NLL {mean_with:,.0f} nats with them, "
                f"{mean:,.0f} without); they are kept as requested, blocks='auto' drops them",
                stacklevel=5,
            )
        if recipe.blocks != "auto" or better:
            models, nll = extended, nll_with
        else:
            kept = 0
    figures = {
        "held_out_nll_with_blocks": mean_with,
        "held_out_nll": float(nll.mean()),
        "held_out_nll_of_whitening": mean,
        "held_out_nll_of_folds": [float(nll[fold].mean()) for fold in models.folds],
    }
    return kept, models, log, figures
