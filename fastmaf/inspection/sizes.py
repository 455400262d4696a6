"""Models of several image sizes, fitted as long as a time budget lasts, and the choice among them.

The smallest size comes first. It decides on augmentation, score and map, and on local blocks, which lower the NLL and
do not change the score: only the smallest has them. All sizes are fitted to the same images, reduced; see
``fastmaf.inspection.selection.candidates``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.reduce import reduced
from fastmaf.inspection.blocks import Log
from fastmaf.inspection.combined import CombinedModel, combine
from fastmaf.inspection.exchangeability import describe_groups
from fastmaf.inspection.fit import FALSE_ALARM, Fitted, fit
from fastmaf.inspection.fit_stages import Stages
from fastmaf.inspection.framed import seen_by
from fastmaf.inspection.interface import AnomalyModel, Candidate, HeldOut
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.out_of_fold import OutOfFoldModels
from fastmaf.inspection.pixel_candidate import PixelCandidate
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.selection.candidates import Choice, choose_candidate, combined_model
from fastmaf.inspection.synthetic_defects.draw import draw_defects
from fastmaf.inspection.texture.candidate import TextureCandidate
from fastmaf.inspection.tiled import TiledModel
from fastmaf.training.callbacks import Callback

SIZES = (64, 128, 256)
BUDGET = 120.0
"""Seconds that the fits of a choice may take."""

_LONG = 300.0  # a budget from which on the largest size is considered: its images need the memory at once
_GROWTH = 2.5, 4.5  # of the time, from the first size, which selects and trains more, and from one to the next
_DRAWS = 2  # synthetic defects per good image
IMAGES = 500  # that defects are drawn onto, at most: more would take time and memory, and change little


@dataclass(frozen=True, eq=False)
class FittedSizes:
    """What ``fit_sizes`` chose.

    Attributes:
        model: of one size, or a ``CombinedModel``; also with or of features, see ``fastmaf.inspection.features.fit``.
        candidates: the fits, of ascending size.
        skipped: sizes that the time did not suffice for.
        seconds: duration of each fit, and of the choice.
        held_out: scores and maps of the good images, the first set; others are of drawn defects.
    """

    model: AnomalyModel
    candidates: tuple[PixelCandidate, ...]
    skipped: tuple[int, ...]
    seconds: dict[str, float]
    held_out: HeldOut

    @property
    def density(self) -> InspectionModel:
        """The model whose NLL is reported, that of the smallest size."""
        return self.candidates[0].model()

    @property
    def log(self) -> Log:
        """Training curve of the blocks of the smallest size."""
        return self.candidates[0].fitted.log

    @property
    def out_of_fold(self) -> OutOfFoldModels:
        """The models of the folds of the smallest size."""
        return self.candidates[0].fitted.out_of_fold


def sizes_for(side: int, budget: float = BUDGET) -> tuple[int, ...]:
    """Returns the sizes to consider where ``usable_side`` is this long; at least the smallest."""
    known = SIZES if budget >= _LONG else SIZES[:-1]
    return tuple(size for size in known if size <= side) or known[:1]


def sizes_of(model: AnomalyModel) -> tuple[int, ...]:
    """Returns the sizes of the models of pixels in a model, ascending; of a tiled one that of its tiles."""
    model = seen_by(model)
    if isinstance(model, InspectionModel):
        return (model.about.get("recipe", {}).get("size", model.size),)
    parts = model.parts if isinstance(model, (CombinedModel, TiledModel)) else ()
    return tuple(sorted({size for part in parts for size in sizes_of(part)}))


def sides_for(sizes: Sequence[int], recipe: Recipe) -> list[int]:
    """Returns the side of the square images that a fit of each size takes."""
    return [replace(recipe, size=size).side for size in sizes]


@fastmaf.torch_defaults()
def fit_sizes(
    pixels: Tensor,
    sizes: Sequence[int],
    recipe: Recipe | None = None,
    *,
    double: Tensor | None = None,
    groups: Sequence[str] | None = None,
    every_fold: bool = False,
    callbacks: Sequence[Callback] = (),
    stages: Stages | None = None,
    budget: float = BUDGET,
    others: Sequence[TextureCandidate] = (),
    progress: bool = True,
) -> FittedSizes:
    """Fits models of several sizes to good images, and chooses one of them or their combination on drawn defects.

    A size is skipped if the time so far and that expected for it, from the fit before, are more than the budget. The
    time of interrupted runs counts, and a size that one has begun is finished.

    Args:
        pixels: uint8 ``[n, 3, s, s]``, with s the largest side of the recipe of a size and of ``others``.
        sizes: ascending.
        recipe: the settings of every size, except ``size``.
        double: the images at twice the side of the largest size; see ``fit``.
        groups, every_fold: see ``fit``.
        callbacks: see ``fit``; called for the smallest size.
        stages: see ``fit``; of all sizes.
        budget: in seconds.
        others: fitted candidates of another kind, which are compared, too; the first is taken unless another is better
            beyond chance.
        progress: show progress bars.

    Returns:
        The choice; its model takes images of ``pixels``' size, also where a smaller one was chosen.

    Raises:
        ValueError: ``sizes`` do not ascend, or not to the side of the images; others as ``fit``.
    """
    recipe, side = recipe or Recipe(), int(pixels.shape[-1])
    largest = max([*(sides_for(sizes, recipe)[-1:]), *(other.size for other in others)], default=0)
    if list(sizes) != sorted(set(sizes)) or not sizes or largest != side:
        raise ValueError(f"sizes must ascend to {side}, the side of the images; found {tuple(sizes)}")
    options: Any = {"double": double, "groups": groups, "every_fold": every_fold, "progress": progress}
    candidates, seconds = fit_each(pixels, sizes, recipe, budget=budget, callbacks=callbacks, stages=stages, **options)
    begun = time.perf_counter()
    preferred = others[0].name if others else None
    model, held_out = _chosen([*candidates, *others], pixels, recipe.seed, preferred)
    if groups is not None:
        model.about["groups"] = describe_groups(groups, held_out.scores[0], model.calibration)
    seconds["choice"] = time.perf_counter() - begun
    skipped = tuple(sizes[len(candidates) :])
    model.about["skipped_sizes"] = list(skipped)
    return FittedSizes(model, tuple(candidates), skipped, seconds, held_out)


def fit_each(
    pixels: Tensor,
    sizes: Sequence[int],
    recipe: Recipe,
    *,
    double: Tensor | None,
    groups: Sequence[str] | None,
    every_fold: bool,
    callbacks: Sequence[Callback],
    stages: Stages | None,
    budget: float,
    progress: bool,
) -> tuple[list[PixelCandidate], dict[str, float]]:
    """Returns fits of several sizes, at most that of the images, and their durations; arguments as ``fit_sizes``."""
    side, stages = int(pixels.shape[-1]), Stages() if stages is None else stages
    candidates: list[PixelCandidate] = []
    for size in sizes:
        name, seconds = f"{size} pixels", [stages.seconds[candidate.name] for candidate in candidates]
        begun = name in stages.seconds  # by an interrupted run, within the budget
        if candidates and not begun and sum(seconds) + _GROWTH[len(candidates) > 1] * seconds[-1] > budget:
            break
        of_size = _following(recipe, candidates[0].fitted, size) if candidates else replace(recipe, size=size)
        own = of_size.side
        twice = reduced(pixels, 2 * own) if 2 * own <= side else double if own == side else None
        with stages.timed(name):
            fitted = fit(
                reduced(pixels, own),
                of_size,
                double=twice,
                groups=groups,
                every_fold=every_fold,
                callbacks=() if candidates else callbacks,
                stages=stages,
                checks=not candidates,
                progress=progress,
            )
        candidates.append(PixelCandidate(fitted))
    return candidates, {candidate.name: stages.seconds[candidate.name] for candidate in candidates}


def _following(recipe: Recipe, first: Fitted, size: int) -> Recipe:
    """Returns the recipe of a further size: what the first size selected, and no blocks unless asked for.

    Where the first size takes the score of a baseline, the score of the others is selected again.
    """
    found, model = first.model.about["recipe"], first.model
    ratio = size / found["size"]
    score, config = model.settings, model.map_config
    scaled = replace(score, sigma=score.sigma * ratio, presmooth_sigma=score.presmooth_sigma * ratio)
    return replace(
        recipe,
        size=size,
        augmentation=found["augmentation"],
        channels=found["channels"],
        blocks=0 if recipe.blocks == "auto" else recipe.blocks,
        score=scaled if model.about.get("baseline") is None else recipe.score,
        map_config=replace(config, sigma=config.sigma * ratio, rms=1.0),
    )


def _chosen(
    candidates: Sequence[PixelCandidate | TextureCandidate], pixels: Tensor, seed: int, preferred: str | None
) -> tuple[AnomalyModel, HeldOut]:
    side = int(pixels.shape[-1])
    if len(candidates) == 1 and candidates[0].size == side:
        return candidates[0].model(), candidates[0].held_out([pixels])
    index, some = np.arange(len(pixels)), list(candidates)
    for i, candidate in enumerate(candidates):
        index, some[i] = candidate.subset(IMAGES, seed)  # the same images of each
    compared = pixels[torch.from_numpy(index)]
    draws = _DRAWS if len(candidates) > 1 else 1
    drawn = [draw_defects(compared, seed=seed + 1 + i) for i in range(draws)]
    choice = choose_candidate(some, compared, drawn, preferred=preferred)
    return model_of_all(choice, candidates, pixels, len(index))


def model_of_all(
    choice: Choice, candidates: Sequence[Candidate], pixels: Tensor, compared: int
) -> tuple[AnomalyModel, HeldOut]:
    """Returns the chosen model, calibrated on all images where the choice was among some of them, and its results."""
    side = int(pixels.shape[-1])
    if compared == len(pixels):
        scores, maps = choice.held_out
        return choice.model, HeldOut(scores[:1], maps[:1].copy())  # without those of the drawn defects
    chosen = [candidate for candidate in candidates if candidate.name in choice.names]
    if len(chosen) == 1 and chosen[0].size == side:
        model_alone = chosen[0].model()
        model_alone.about.update(choice.figures)
        return model_alone, chosen[0].held_out([pixels])
    held_out = [candidate.held_out([reduced(pixels, candidate.size)]) for candidate in chosen]
    combination = combine(choice.names, held_out, side)
    model = combined_model([candidate.model() for candidate in chosen], combination, side, FALSE_ALARM)
    model.about.update(choice.figures)
    return model, combination.held_out
