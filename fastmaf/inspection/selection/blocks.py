"""Selecting whether a flow keeps its local autoregressive blocks, by held-out likelihood."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

import fastmaf
from fastmaf.inspection.blocks import fit_blocks
from fastmaf.inspection.out_of_fold import OutOfFoldModels, drop_fold
from fastmaf.inspection.recipe import Recipe


@dataclass(frozen=True, eq=False)
class SelectedBlocks:
    """Whether blocks are kept, and the likelihoods that decided it.

    Attributes:
        models: the flow fitted without each fold, with the blocks that are kept.
        kept: the number of blocks kept.
        whitening_nll: held-out NLL of each image under the whitening alone, float64 ``[n]`` nats.
        nll: the same under the selected flow.
        nll_with: mean held-out NLL with the trained blocks, kept or not; None if none were trained.
        log: training curve of the first fold, rows of step and NLLs.
    """

    models: OutOfFoldModels
    kept: int
    whitening_nll: Tensor
    nll: Tensor
    nll_with: float | None = None
    log: list[dict[str, float]] = field(default_factory=list)


def select_blocks(
    x: Tensor, z: Tensor, models: OutOfFoldModels, recipe: Recipe, done: Callable[[], object] = lambda: None
) -> SelectedBlocks:
    """Trains blocks without each fold, and drops them if held-out images are no more likely with them.

    Args:
        x: normal images ``[n, D]``, as their NLL is measured.
        z: the same, each whitened by the model of the fold that left it out ``[n, D]``.
        models: the whitenings fitted without each fold, with the transforms before them.
        recipe: a number of blocks is kept in any case, ``"auto"`` is not.
        done: called after each fold.

    Warns:
        UserWarning: held-out images are no more likely with the blocks that the recipe asks for.
    """
    whitening_nll = models.nll(x)
    if not recipe.most_blocks:
        return SelectedBlocks(models, 0, whitening_nll, whitening_nll)
    log: list[dict[str, float]] = []
    flows: list[fastmaf.Flow] = []
    for fold, flow in zip(models.folds, models.flows, strict=True):
        blocks = fit_blocks(drop_fold(z, fold), recipe, z[fold], None if flows else log)
        flows.append(fastmaf.Flow(recipe.features, [*flow.transforms, *blocks]).eval())  # type: ignore[list-item]
        done()
    extended = OutOfFoldModels(models.folds, flows)
    nll = extended.nll(x)
    mean, mean_without = float(nll.mean()), float(whitening_nll.mean())
    better = mean < mean_without  # False for NaN
    if recipe.blocks == "auto" and not better:
        return SelectedBlocks(models, 0, whitening_nll, whitening_nll, mean, log)
    if not better:
        warnings.warn(
            f"blocks={recipe.blocks} do not make held-out images more likely (NLL {mean:,.0f} nats with them, "
            f"{mean_without:,.0f} without); they are kept as requested, blocks='auto' drops them",
            stacklevel=4,
        )
    return SelectedBlocks(extended, recipe.most_blocks, whitening_nll, nll, mean, log)
