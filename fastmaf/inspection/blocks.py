"""The local autoregressive blocks of a flow: training them, and dropping them if they do not help."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import fastmaf
from fastmaf.inspection.out_of_fold import OutOfFoldModels, drop_fold
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.float64_flow import FlowValues
from fastmaf.training.callbacks import Callback

Log: TypeAlias = list[dict[str, float]]

_LOGGED = 32  # held-out images of the training curve, at most


class SelectedBlocks(NamedTuple):
    """What ``select_blocks`` found.

    Attributes:
        kept: number of blocks.
        models: of the folds, with blocks if they were trained without every fold.
        log: the training curve of the first fold, rows of step and NLLs.
        figures: the mean held-out NLLs in nats that decided, for the record.
        blocks: of the final model.
    """

    kept: int
    models: OutOfFoldModels
    log: Log
    figures: dict[str, Any]
    blocks: list[fastmaf.Transform]


class Adam:
    """Adam with gradients clipped to a norm of 1, so that one unusual image does not destroy the weights.

    That of torch imports its compiler, which takes as long as the training.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.numel()]  # a linear block has empty ones
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, loss: Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        """Takes one step down the gradient of a loss."""
        grads = torch.autograd.grad(loss, self.parameters)
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        clip = (1 / (norm + 1e-6)).clamp_max(1.0)
        self.steps += 1
        corrections = [1 - beta**self.steps for beta in betas]
        for parameter, grad, (mean, square) in zip(self.parameters, grads, self.moments, strict=True):
            grad = grad * clip
            mean.lerp_(grad, 1 - betas[0])
            square.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
            root = (square / corrections[1]).sqrt_().add_(eps)
            parameter.addcdiv_(mean, root, value=-lr / corrections[0])


def one_cycle(progress: float) -> float:
    """Returns the learning rate at a time from 0 to 1 as a share of the largest, as ``OneCycleLR`` does."""
    low, high, end, rise = 1 / 25, 1.0, 1 / 250_000, 0.3
    if progress < rise:
        start, stop, place = low, high, progress / rise
    else:
        start, stop, place = high, end, (progress - rise) / (1 - rise)
    return stop + (start - stop) * 0.5 * (1 + math.cos(math.pi * place))


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
    shape = (recipe.features // math.prod(recipe.shape), *recipe.shape)
    options = {"patch": recipe.patch, "kernel": recipe.kernel, "hidden": recipe.hidden}
    blocks: list[fastmaf.Transform] = [
        fastmaf.LocalAutoregressive(shape, **options, reverse=bool(i % 2), generator=generator)
        for i in range(recipe.most_blocks)
    ]
    if not blocks:
        return blocks
    flow = fastmaf.Flow(recipe.features, blocks)
    adam = Adam(list(flow.parameters()))
    for step in range(1, recipe.steps + 1):
        batch = z[torch.randint(len(z), (min(recipe.batch_size, len(z)),), generator=generator)]
        loss = -flow.log_prob(batch).mean() / recipe.features
        adam.step(loss, recipe.lr * one_cycle((step - 1) / max(1, recipe.steps - 1)))
        if log is not None and held_out is not None and (step % 10 == 0 or step == 1):
            with torch.no_grad():
                train, test = (float(-flow.log_prob(part).double().mean()) for part in (batch, held_out))
            log.append({"step": step, "nll": train, "held_out_nll": test})
            for callback in callbacks:
                callback(step, {"nll": train, "held_out_nll": test})
    return blocks


def select_blocks(
    x: Tensor,
    models: OutOfFoldModels,
    recipe: Recipe,
    done: Callable[[], object],
    *,
    callbacks: Sequence[Callback] = (),
    every_fold: bool = False,
) -> SelectedBlocks:
    """Trains blocks without a fold or each, and drops them if held-out images are no more likely with them.

    With ``blocks="auto"`` the first fold decides, and only it is trained unless ``every_fold``: the NLLs of the others
    with blocks are those without, plus the difference over the first. A block has a few thousand weights, learnt from
    millions of values, so that the difference hardly depends on the fold; the final model has the same blocks then.

    Args:
        x: good images ``[n, D]``, as their NLL is measured.
        models: the whitenings fitted without each fold, with the transforms before them.
        recipe: a number of blocks is kept in any case, ``"auto"`` is not.
        done: called after each fold.
        callbacks: called with the rows of the training curve.
        every_fold: train blocks without each fold in any case.

    Warns:
        UserWarning: held-out images are no more likely with the blocks that the recipe asks for.
    """
    # Each image is whitened by the model of the fold that left it out.
    whitened: list[Callable[[FlowValues], Tensor]] = [
        lambda values: values.whitened[0].to(x.dtype),
        lambda values: values.nll,
    ]
    (z,), (nll,) = models.held_out_each([x], whitened)
    kept, blocks = recipe.most_blocks, list[fastmaf.Transform]()
    without, log = nll, list[dict[str, float]]()
    flows: list[fastmaf.Flow] = []
    every_fold = every_fold or recipe.blocks != "auto"
    with_blocks: Tensor | None = None
    for fold, flow in zip(models.folds if kept else (), models.flows, strict=False):
        blocks = fit_blocks(drop_fold(z, fold), recipe, z[fold[:_LOGGED]], None if flows else log, callbacks)
        flows.append(fastmaf.Flow(recipe.features, [*flow.transforms, *blocks]).eval())  # type: ignore[list-item]
        done()
        if len(flows) == 1:
            change = float(FlowValues(flows[0], x[fold]).nll.mean()) - float(nll[fold].mean())
            with_blocks = nll + change
            if recipe.blocks == "auto" and not (every_fold and change < 0):
                break
    if len(flows) == len(models.folds):
        extended = models.with_flows(flows)
        with_blocks = extended.nll(x)
        if recipe.blocks != "auto" or float(with_blocks.mean()) < float(without.mean()):
            models = extended
    if with_blocks is not None:
        better = float(with_blocks.mean()) < float(without.mean())  # False for NaN
        if recipe.blocks != "auto" and not better:
            warnings.warn(
                f"blocks={recipe.blocks} do not make held-out images more likely (NLL {with_blocks.mean():,.0f} nats "
                f"with them, {without.mean():,.0f} without); they are kept as requested, blocks='auto' drops them",
                stacklevel=5,
            )
        if recipe.blocks != "auto" or better:
            nll = with_blocks
        else:
            kept = 0
    figures = {
        "held_out_nll_with_blocks": None if with_blocks is None else float(with_blocks.mean()),
        "held_out_nll": float(nll.mean()),
        "held_out_nll_of_whitening": float(without.mean()),
        "held_out_nll_of_folds": [float(nll[fold].mean()) for fold in models.folds],
    }
    if len(flows) > 1:
        blocks = fit_blocks(z, replace(recipe, blocks=kept))
    return SelectedBlocks(kept, models, log, figures, blocks if kept else [])
