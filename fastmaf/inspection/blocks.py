"""Training the local autoregressive blocks of a recipe."""

from __future__ import annotations

import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.recipe import Recipe


def fit_blocks(
    z: Tensor, recipe: Recipe, held_out: Tensor | None = None, log: list[dict[str, float]] | None = None
) -> list[fastmaf.Transform]:
    """Returns blocks trained on whitened images ``[n, D]``.

    Args:
        z: whitened images.
        recipe: the settings.
        held_out: whitened images to evaluate on.
        log: if given with ``held_out``, receives rows of step and the NLLs of the batch and of ``held_out``.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    shape = (3, recipe.size, recipe.size)
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
    return blocks
