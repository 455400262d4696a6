"""Fitting an inspection model to normal images: ``fastmaf train --recipe inspection``.

1. A Gaussian whitening, in closed form, on the images or on shifted or turned copies of them: that of the three by
   which held-out images are likeliest.
2. K folds: each normal is whitened by the model of the fold that left it out. Blocks are trained on these terms, since
   those of a model that has seen the image are far smaller than a new image's will be.
3. The same once more for each fold without its own images, for terms, scores and NLLs of images that neither a
   whitening nor a step of its blocks has seen. (The terms that these blocks were trained on are of the other folds'
   whitenings, which have; a score of the whitened terms, the default, has nothing to do with them.) Blocks with which
   these images are no likelier than without are left out.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fastmaf
from fastmaf.images.dataset import to_unit
from fastmaf.inspection.blocks import choose_blocks, fit_blocks
from fastmaf.inspection.calibration import Calibration, k_fold
from fastmaf.inspection.copies import before_whitening, choose_copies, compared_whitenings, fit_whitening
from fastmaf.inspection.cross import CrossFit, cross_maps, cross_scores, without
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.settle import settled


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted model, the fold models behind its statistics, and the blocks' training curve (rows of step and NLLs)."""

    model: InspectionModel
    cross: CrossFit
    log: list[dict[str, float]]
    seconds: dict[str, float]


@fastmaf.torch_defaults()
def fit(pixels: Tensor, recipe: Recipe | None = None, *, progress: bool = True) -> Fitted:
    """Fits an inspection model to normal images and calibrates it at a false-alarm rate of 5 %.

    Copies and blocks that the recipe leaves open are kept only where held-out images are likelier with them;
    ``model.about`` holds the NLLs that were compared.

    Args:
        pixels: uint8 ``[n, 3, size, size]``, n >= folds.
        recipe: the settings.
        progress: show a progress bar.

    Raises:
        ValueError: there are fewer images than folds, or they are of another size.

    Warns:
        UserWarning: held-out images are less likely with a part that the recipe asks for.
    """
    asked = recipe or Recipe(size=int(pixels.shape[-1]))
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, asked.size, asked.size):
        expected = f"uint8 [n, 3, {asked.size}, {asked.size}]"
        raise ValueError(f"pixels must be {expected}; found {pixels.dtype} {list(pixels.shape)}")
    x = to_unit(pixels)
    given = dequantized(x, asked.seed) if asked.dequantize else x
    folds = k_fold(len(x), asked.folds, asked.seed)
    steps = compared_whitenings(asked, len(x)) + asked.folds + 1 + asked.folds * bool(asked.most_blocks)
    began, seconds = time.perf_counter(), {}
    with tqdm(total=steps, desc="fitting", unit="model", disable=not progress, leave=False) as bar:
        copies = choose_copies(given, folds, asked, bar.update)
        recipe, whitenings = copies.recipe, copies.whitenings
        first = before_whitening(recipe)
        y = fastmaf.Flow(recipe.features, first)(given)[0]  # what the whitening gets to see
        for fold in folds[len(whitenings) :]:
            whitenings.append(fit_whitening(without(y, fold), recipe))
            bar.update()
        whole = fit_whitening(y, recipe)
        bar.update()
        alone = [fastmaf.Flow(recipe.features, [*first, whitening]).eval() for whitening in whitenings]
        seconds["whitenings"] = time.perf_counter() - began
        z = torch.empty_like(x)
        for fold, whitening in zip(folds, whitenings, strict=True):
            z[fold] = whitening(y[fold])[0]
        blocks = choose_blocks(given, z, folds, alone, recipe, bar.update)
        recipe = replace(recipe, blocks=blocks.kept)
        flow = fastmaf.Flow(recipe.features, [*first, whole, *fit_blocks(z, recipe)]).eval().requires_grad_(False)
        seconds["blocks"] = time.perf_counter() - began - seconds["whitenings"]
    whitened, nll = blocks.nll_alone, blocks.nll
    cross = CrossFit(folds, blocks.flows, whitened.numpy(), nll.numpy())
    score, location, said = settled(recipe, pixels, cross)
    statistics, scores = cross_scores(x, cross.flows, folds, score, recipe.size)
    location, maps = cross_maps(x, cross.flows, folds, location)
    seconds["scores"] = time.perf_counter() - began - seconds["whitenings"] - seconds["blocks"]
    about = {
        "recipe": asdict(replace(recipe, score=score, location=location)),
        "asked": {"blocks": asked.blocks, "copies": asked.copies},
        **said,
        "images": len(x),
        "held_out_nll_of_copies": copies.nll,
        "held_out_nll_without_logit": copies.nll_without_logit,
        "held_out_nll_with_blocks": blocks.nll_with,
        "held_out_nll": float(nll.mean()),
        "held_out_nll_of_whitening": float(whitened.mean()),
        "images_of_folds": [len(fold) for fold in folds],
        "held_out_nll_of_folds": [float(nll[fold].mean()) for fold in folds],
        "map_levels": [float(np.quantile(maps.numpy(), 0.99)), float(maps.max())],
    }
    calibration = Calibration(scores.numpy(), 0.05, None, "k-fold", asked.folds)
    model = InspectionModel(flow, score, location, statistics, calibration, about)
    return Fitted(model, cross, blocks.log, seconds)


def dequantized(x: Tensor, seed: int) -> Tensor:
    """Returns 8-bit values on [0, 1], each spread evenly over its bin, from half a step below to half a step above.

    A density's NLL of such data, in bits and over D, plus log2(255) is at least that of the values themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    return x + (torch.rand(x.shape, generator=generator) - 0.5) / 255
