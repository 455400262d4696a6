"""Fitting an inspection model to good images.

1. A Gaussian whitening, in closed form, of the images with the augmentation under which held-out images are most
   likely.
2. K folds: each image is whitened by the model of the fold that left it out. Blocks are trained on these values, as
   those of a model that has seen the image are far smaller than a new image's will be.
3. The same without the images of each fold, for terms, scores and NLLs of images that neither the whitening nor the
   blocks have seen. (The values that these blocks were trained on come from the other folds' whitenings, which have
   seen them; this does not affect a score of the whitened terms, the default.) Blocks that do not make these images
   more likely are dropped.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import is_grey, to_grey, to_unit
from fastmaf.images.progress import Progress
from fastmaf.images.reduce import reduced
from fastmaf.inspection.blocks import Log, select_blocks
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.exchangeability import describe_groups, order_matters
from fastmaf.inspection.fit_stages import Stages
from fastmaf.inspection.free_threads import free_threads
from fastmaf.inspection.held_out_terms import out_of_fold_results
from fastmaf.inspection.interface import HeldOut
from fastmaf.inspection.map_shapes import squared
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.out_of_fold import (
    OutOfFoldModels,
    group_folds,
    k_fold,
    reference_statistics,
)
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.selection.select import select_score_and_map
from fastmaf.inspection.whitening import (
    Normals,
    before_whitening,
    count_fits,
    fit_whitenings,
    select_augmentation,
)
from fastmaf.threads import beside
from fastmaf.training.callbacks import Callback

FALSE_ALARM = 0.05
"""The false-alarm rate that a fit calibrates at."""

_ORDER_FOLDS = 5  # of neighbouring images, which a series should fit into


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted model, the models of the folds behind its statistics, and the training curve of the blocks.

    Attributes:
        model: the calibrated model.
        out_of_fold: the models of the folds.
        log: rows of step and NLLs.
        seconds: duration of each stage.
        held_out: of the good images, one set.
    """

    model: InspectionModel
    out_of_fold: OutOfFoldModels
    log: Log
    seconds: dict[str, float]
    held_out: HeldOut

    @property
    def density(self) -> InspectionModel:
        """The model whose NLL is reported."""
        return self.model


@fastmaf.torch_defaults()
@free_threads()
def fit(
    pixels: Tensor,
    recipe: Recipe | None = None,
    *,
    double: Tensor | None = None,
    groups: Sequence[str] | None = None,
    callbacks: Sequence[Callback] = (),
    stages: Stages | None = None,
    every_fold: bool = False,
    checks: bool = True,
    progress: bool = True,
) -> Fitted:
    """Fits an inspection model to good images and calibrates it at a false-alarm rate of 5%.

    Augmentation and blocks that the recipe leaves open are kept only if held-out images are more likely with them;
    ``model.about`` holds the NLLs that were compared.

    Args:
        pixels: uint8 ``[n, 3, s, s]`` with s = ``recipe.side``, n >= 3.
        recipe: the settings.
        double: the same images at twice the size, uint8 ``[n, 3, 2 s, 2 s]``, from which shifted and rotated
            copies are made; None to interpolate ``pixels``, which blurs them.
        groups: the group of each image, such as its part, batch or day; folds then hold out whole groups, so that
            scores, threshold and choices are those for images of new groups. None: folds are random.
        callbacks: called every ten steps of the blocks of the first fold, with ``nll`` and ``held_out_nll``, means
            over whitened images in nats.
        stages: of an interrupted fit to the same images with the same recipe, which is continued; finished stages are
            added.
        every_fold: train blocks without each fold, too, where ``blocks="auto"`` would train them without the first
            alone: for the fold models' densities.
        checks: warn where neighbouring images are alike, or where held-out images are less likely with the augmentation
            that the recipe asks for. False where the same images were checked before.
        progress: show a progress bar.

    Raises:
        ValueError: there are fewer than two images or fewer than two groups, or the images have another size.

    Warns:
        UserWarning: held-out images are less likely with a part that the recipe asks for, or ``groups`` is None and
            neighbouring images are alike.
    """
    asked = recipe or Recipe(size=int(pixels.shape[-1]))
    side, shape = asked.side, asked.shape
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, side, side):
        expected = f"uint8 [n, 3, {side}, {side}]"
        raise ValueError(f"pixels must be {expected}; found {pixels.dtype} {list(pixels.shape)}")
    if double is not None and (double.dtype, double.shape) != (
        torch.uint8,
        (*pixels.shape[:2], 2 * side, 2 * side),
    ):
        expected = f"uint8 {[*pixels.shape[:2], 2 * side, 2 * side]}"
        raise ValueError(f"double must be {expected}; found {double.dtype} {list(double.shape)}")
    pixels = reduced(pixels, shape)
    double = None if double is None else reduced(double, (2 * shape[0], 2 * shape[1]))
    channels = asked.channels if isinstance(asked.channels, int) else 1 if is_grey(pixels) else 3
    given, asked = asked, replace(asked, channels=channels)
    images = to_unit(pixels, channels)
    if double is not None and channels == 1:
        double = to_grey(double)
    x = dequantized(images, asked.seed) if asked.dequantize else images
    if groups is not None and len(groups) != len(x):
        raise ValueError(f"groups must name the group of each of {len(x)} images; found {len(groups)}")
    most = min(asked.folds, len(x))
    folds = k_fold(len(x), most, asked.seed) if groups is None else group_folds(groups, most)
    asked = replace(asked, folds=len(folds))
    if checks and groups is None and (warning := order_matters(images, min(asked.folds, _ORDER_FOLDS), asked.seed)):
        warnings.warn(warning, stacklevel=4)
    of_flow = asked.score is not None and (asked.score.source == "flow" or asked.score.needs_nll)
    every_fold = every_fold or asked.blocks != "auto" or of_flow
    steps = count_fits(asked, len(x)) + (asked.folds if every_fold else 1) * bool(asked.most_blocks) + 2
    times, stages = [time.perf_counter()], Stages() if stages is None else stages
    with Progress(f"fitting {asked.size} pixels: whitening", "step", total=steps, show=progress) as bar:
        whitened = stages.whitenings(asked)
        if whitened is None:
            if checks or asked.augmentation == "auto":
                whitened = select_augmentation(Normals(x, double), folds, asked, bar.update)
            else:
                whitened = asked, fit_whitenings(Normals(x, double), folds, asked), {}
            stages.keep_whitenings(*whitened)
        recipe, whitenings, augmentation_figures = whitened
        first = before_whitening(recipe)
        times.append(time.perf_counter())
        bar.set_description(f"fitting {asked.size} pixels: blocks")
        flows = [fastmaf.Flow(recipe.features, [*first, fold_whitening]).eval() for fold_whitening in whitenings.folds]
        models = OutOfFoldModels(folds, flows, shape)
        # The choice depends on whitened values alone, not on the blocks.
        with beside(partial(select_score_and_map, recipe, pixels, models)) as selected_score:
            selected = stages.blocks(recipe, models)
            if selected is None:
                selected = select_blocks(x, models, recipe, bar.update, callbacks=callbacks, every_fold=every_fold)
                stages.keep_blocks(recipe, models, selected)
            times.append(time.perf_counter())
            bar.set_description(f"fitting {asked.size} pixels: score and map")
            score, map_config, baseline, figures, known = selected_score()
        kept, models, log, block_figures, blocks = selected
        recipe = replace(recipe, rank=recipe.factors, blocks=kept)
        flow = fastmaf.Flow(recipe.features, [*first, whitenings.whole, *blocks]).eval().requires_grad_(False)
        bar.update()
        if baseline is not None:
            flow, models, score = baseline.flow.requires_grad_(False), baseline.models, baseline.score
        unit = replace(map_config, rms=1.0)
        held_out, (scores,), (maps,) = out_of_fold_results([pixels], models, score, unit, known)
        statistics = reference_statistics(flow, pixels, held_out, score, models.shape)
        maps = squared(maps, side)
        rms = float(np.sqrt(np.square(maps, dtype=np.float64).mean())) or 1.0  # identical images leave no residual
        map_config, maps = replace(map_config, rms=rms), maps / np.float32(rms)
        times.append(time.perf_counter())
        bar.update()
    calibration = Calibration(scores, FALSE_ALARM, None, "k-fold", asked.folds)
    if groups is not None:
        figures["groups"] = describe_groups(groups, scores, calibration)
    about = {
        "recipe": asdict(replace(recipe, score=score, map_config=map_config)),
        "asked": {
            "rank": given.rank,
            "blocks": given.blocks,
            "augmentation": given.augmentation,
            "channels": given.channels,
        },
        **augmentation_figures,
        **block_figures,
        **figures,
        "images": len(x),
        "images_of_folds": [len(fold) for fold in folds],
        "map_levels": [float(np.quantile(maps, 0.99)), float(maps.max())],
    }
    model = InspectionModel(flow, score, map_config, statistics, calibration, about, own_shape=shape)
    seconds = dict(zip(("whitenings", "blocks", "scores"), np.diff(times).tolist(), strict=True))
    return Fitted(model, models, log, seconds, HeldOut(scores[None], maps[None]))


def dequantized(x: Tensor, seed: int) -> Tensor:
    """Returns 8-bit values on [0, 1], each spread evenly over its bin, from half a step below to half a step above.

    A density's NLL of such data, in bits and over D, plus log2(255) is at least that of the values themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    return x + (torch.rand(x.shape, generator=generator) - 0.5) / 255
