"""Fitting an inspection model to normal images: ``fastmaf train --recipe inspection``.

1. A Gaussian whitening, in closed form, on shifted copies, or on turned ones where held-out normals of one fold are
   likelier then: their objects lie at any angle.
2. K folds: each normal is whitened by the model of the fold that left it out. Blocks are trained on these terms, since
   those of a model that has seen the image are far smaller than a new image's will be.
3. The same once more for each fold without its own images, for terms, scores and NLLs of images that neither a
   whitening nor a step of its blocks has seen. (The terms that these blocks were trained on are of the other folds'
   whitenings, which have; a score of the whitened terms, the default, has nothing to do with them.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fastmaf
from fastmaf.capsule.data import to_unit
from fastmaf.inspection.augment import rotated_copies, shifted_copies
from fastmaf.inspection.calibration import Calibration, k_fold
from fastmaf.inspection.cross import CrossFit, cross_maps, cross_scores, without
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.recipe import COPIES, QUANTISATION, Copies, Recipe
from fastmaf.inspection.scores import ScoreSettings, terms_and_nll
from fastmaf.inspection.settle import settled


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted model, the fold models behind its statistics, and the blocks' training curve (rows of step and NLLs)."""

    model: InspectionModel
    cross: CrossFit
    log: list[dict[str, float]]
    seconds: dict[str, float]


def fit(pixels: Tensor, recipe: Recipe | None = None, *, progress: bool = True) -> Fitted:
    """Fits an inspection model to normal images and calibrates it at a false-alarm rate of 5 %.

    Args:
        pixels: uint8 ``[n, 3, size, size]``, n >= folds.
        recipe: the settings.
        progress: show a progress bar.

    Raises:
        ValueError: there are fewer images than folds, or they are of another size.
    """
    recipe = recipe or Recipe(size=int(pixels.shape[-1]))
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, recipe.size, recipe.size):
        expected = f"uint8 [n, 3, {recipe.size}, {recipe.size}]"
        raise ValueError(f"pixels must be {expected}; found {pixels.dtype} {list(pixels.shape)}")
    x, first = to_unit(pixels), [] if recipe.logit is None else [fastmaf.Logit(recipe.features, recipe.logit)]
    given = dequantized(x, recipe.seed) if recipe.dequantize else x
    y = fastmaf.Flow(recipe.features, first)(given)[0]  # what the whitening gets to see
    steps = recipe.folds + (1 if recipe.copies != "auto" else len(COPIES))
    steps += recipe.folds + 1 if recipe.blocks else 0
    began, seconds = time.perf_counter(), {}
    with tqdm(total=steps, desc="fitting", unit="model", disable=not progress, leave=False) as bar:
        folds = k_fold(len(x), recipe.folds, recipe.seed)
        whitenings, z = [], torch.empty_like(x)
        tried: dict[str, float] = {}
        if recipe.copies == "auto":
            recipe, likeliest, tried = _likelier(given, first, folds[0], recipe, bar.update)
            whitenings.append(likeliest)
        for fold in folds[len(whitenings) :]:
            whitenings.append(fit_whitening(without(y, fold), recipe))
            bar.update()
        for fold, whitening in zip(folds, whitenings, strict=True):
            z[fold] = whitening(y[fold])[0]
        whole = fit_whitening(y, recipe)
        bar.update()
        seconds["whitenings"] = time.perf_counter() - began
        log: list[dict[str, float]] = []
        flows: list[fastmaf.Flow] = []
        for fold, whitening in zip(folds, whitenings, strict=True):
            own = fit_blocks(without(z, fold), recipe, z[fold], log if not flows else None)
            flows.append(fastmaf.Flow(recipe.features, [*first, whitening, *own]).eval())
            bar.update(bool(recipe.blocks))
        blocks = fit_blocks(z, recipe)
        flow = fastmaf.Flow(recipe.features, [*first, whole, *blocks]).eval().requires_grad_(False)
        bar.update(bool(recipe.blocks))
        seconds["blocks"] = time.perf_counter() - began - seconds["whitenings"]
    whitened, nll = torch.empty(len(x), dtype=torch.float64), torch.empty(len(x), dtype=torch.float64)
    for fold, whitening, own_flow in zip(folds, whitenings, flows, strict=True):
        alone = fastmaf.Flow(recipe.features, [*first, whitening])
        whitened[fold] = terms_and_nll(alone, given[fold], ScoreSettings())[1]
        nll[fold] = terms_and_nll(own_flow, given[fold], ScoreSettings())[1]
    cross = CrossFit(folds, flows, whitened.numpy(), nll.numpy())
    score, location, said = settled(recipe, pixels, cross)
    statistics, scores = cross_scores(x, flows, folds, score, recipe.size)
    location, maps = cross_maps(x, flows, folds, location)
    seconds["scores"] = time.perf_counter() - began - seconds["whitenings"] - seconds["blocks"]
    about = {
        "recipe": asdict(replace(recipe, score=score, location=location)),
        **said,
        "images": len(x),
        "held_out_nll_of_copies": tried,
        "held_out_nll": float(nll.mean()),
        "held_out_nll_of_whitening": float(whitened.mean()),
        "images_of_folds": [len(fold) for fold in folds],
        "held_out_nll_of_folds": [float(nll[fold].mean()) for fold in folds],
        "map_levels": [float(np.quantile(maps.numpy(), 0.99)), float(maps.max())],
    }
    calibration = Calibration(scores.numpy(), 0.05, None, "k-fold", recipe.folds)
    return Fitted(InspectionModel(flow, score, location, statistics, calibration, about), cross, log, seconds)


def _likelier(
    x: Tensor, first: list[fastmaf.Logit], fold: np.ndarray, recipe: Recipe, done: Callable[[], object]
) -> tuple[Recipe, fastmaf.GaussianWhitening, dict[str, float]]:
    """Returns the recipe with the copies by which the images of a fold are likeliest, its whitening without them, and
    the mean NLL in nats with each kind.
    """
    y = fastmaf.Flow(recipe.features, first)(x)[0]
    fitted: dict[Copies, fastmaf.GaussianWhitening] = {}
    nll: dict[Copies, float] = {}
    for copies in COPIES:
        fitted[copies] = fit_whitening(without(y, fold), replace(recipe, copies=copies))
        flow = fastmaf.Flow(recipe.features, [*first, fitted[copies]])
        nll[copies] = float(terms_and_nll(flow, x[fold], ScoreSettings())[1].mean())
        done()
    best = min(COPIES, key=nll.__getitem__)
    return replace(recipe, copies=best), fitted[best], {str(copies): value for copies, value in nll.items()}


def dequantized(x: Tensor, seed: int) -> Tensor:
    """Returns 8-bit values on [0, 1], each spread evenly over its bin, from half a step below to half a step above.

    A density's NLL of such data, in bits and over D, plus log2(255) is at least that of the values themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    return x + (torch.rand(x.shape, generator=generator) - 0.5) / 255


def fit_whitening(x: Tensor, recipe: Recipe) -> fastmaf.GaussianWhitening:
    """Returns the whitening of normals ``[n, D]`` and their copies, shifted where the recipe leaves that open."""
    if recipe.copies == "rotations":
        copies = rotated_copies(recipe.size, recipe.angles)
    else:
        copies = shifted_copies(recipe.size, recipe.shift_radius, recipe.shift_step)
    made = fastmaf.GaussianWhitening(recipe.features, min(recipe.rank, recipe.features))
    # A logit stretches the steps of 8 bits by its slope, which is least in the middle.
    floor = QUANTISATION if recipe.logit is None else QUANTISATION * (4 * (1 - 2 * recipe.logit)) ** 2
    return made.fit_(x, augment=copies, folds=recipe.folds, floor=floor, seed=recipe.seed)


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
        for i in range(recipe.blocks)
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
