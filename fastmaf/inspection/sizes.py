"""Models of several image sizes, fitted as long as a time budget lasts, and the choice among them.

The smallest size comes first. It decides on augmentation, score and map, and on local blocks, which lower the NLL and
do not change the score: only the smallest has them. All sizes are fitted to the same images, reduced; see
``fastmaf.inspection.selection.candidates``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

import fastmaf
from fastmaf.images.reduce import reduced
from fastmaf.inspection.blocks import Log
from fastmaf.inspection.fit import Fitted, fit
from fastmaf.inspection.interface import AnomalyModel, Candidate
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.out_of_fold import OutOfFoldModels
from fastmaf.inspection.pixel_candidate import PixelCandidate
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.selection.candidates import choose_candidate
from fastmaf.inspection.synthetic_defects.draw import draw_defects

SIZES = (64, 128, 256)
BUDGET = 120.0
"""Seconds that the fits of a choice may take."""

_LONG = 300.0  # a budget from which on the largest size is considered: its images need the memory at once
_GROWTH = 4.5  # of the time, from one size to the next
_DRAWS = 2  # synthetic defects per good image


@dataclass(frozen=True, eq=False)
class FittedSizes:
    """What ``fit_sizes`` chose.

    Attributes:
        model: of one size, or a ``CombinedModel``.
        candidates: the fits, of ascending size.
        skipped: sizes that the time did not suffice for.
        seconds: duration of each fit, and of the choice.
    """

    model: AnomalyModel
    candidates: tuple[PixelCandidate, ...]
    skipped: tuple[int, ...]
    seconds: dict[str, float]

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
    """Returns the sizes to consider for images whose shorter side is at least this long; at least the smallest."""
    known = SIZES if budget >= _LONG else SIZES[:-1]
    return tuple(size for size in known if size <= side) or known[:1]


@fastmaf.torch_defaults()
def fit_sizes(
    pixels: Tensor,
    sizes: Sequence[int],
    recipe: Recipe | None = None,
    *,
    double: Tensor | None = None,
    groups: Sequence[str] | None = None,
    every_fold: bool = False,
    budget: float = BUDGET,
    others: Sequence[Candidate] = (),
    progress: bool = True,
) -> FittedSizes:
    """Fits models of several sizes to good images, and chooses one of them or their combination on drawn defects.

    A size is skipped if the time so far and that expected for it, from the fit before, are more than the budget.

    Args:
        pixels: uint8 ``[n, 3, s, s]``, with s the largest of ``sizes`` and of those of ``others``.
        sizes: ascending.
        recipe: the settings of every size, except ``size``.
        double: the images at twice the largest size; see ``fit``.
        groups, every_fold: see ``fit``.
        budget: in seconds.
        others: fitted candidates of another kind, which are compared, too; the first is taken unless another is better
            beyond chance.
        progress: show progress bars.

    Returns:
        The choice; its model takes images of the largest size, also where a smaller one was chosen.

    Raises:
        ValueError: ``sizes`` do not ascend to the side of the images; others as ``fit``.
    """
    recipe, side = recipe or Recipe(), int(pixels.shape[-1])
    largest = max([*sizes[-1:], *(other.size for other in others)], default=0)
    if list(sizes) != sorted(set(sizes)) or not sizes or largest != side:
        raise ValueError(f"sizes must ascend to {side}, the side of the images; found {tuple(sizes)}")
    started = time.perf_counter()
    candidates: list[PixelCandidate] = []
    seconds: dict[str, float] = {}
    for size in sizes:
        so_far, last = time.perf_counter() - started, next(reversed(seconds.values()), 0.0)
        if so_far + _GROWTH * last > budget and candidates:
            break
        twice = reduced(pixels, 2 * size) if 2 * size <= side else double if size == side else None
        fitted = fit(
            reduced(pixels, size),
            _following(recipe, candidates[0].fitted, size) if candidates else replace(recipe, size=size),
            double=twice,
            groups=groups,
            every_fold=every_fold,
            checks=not candidates,
            progress=progress,
        )
        candidates.append(PixelCandidate(fitted))
        seconds[candidates[-1].name] = time.perf_counter() - started - so_far
    begun = time.perf_counter()
    preferred = others[0].name if others else None
    model = _chosen([*candidates, *others], pixels, recipe.seed, preferred)
    seconds["choice"] = time.perf_counter() - begun
    skipped = tuple(sizes[len(candidates) :])
    model.about["skipped_sizes"] = list(skipped)
    return FittedSizes(model, tuple(candidates), skipped, seconds)


def _following(recipe: Recipe, first: Fitted, size: int) -> Recipe:
    """Returns the recipe of a further size: what the first size selected, and no blocks unless asked for.

    Where the first size takes the score of a baseline, the score of the others is selected again.
    """
    found, model, ratio = first.model.about["recipe"], first.model, size / first.model.size
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


def _chosen(candidates: Sequence[Candidate], pixels: Tensor, seed: int, preferred: str | None) -> AnomalyModel:
    if len(candidates) == 1 and candidates[0].size == pixels.shape[-1]:
        return candidates[0].model()
    draws = _DRAWS if len(candidates) > 1 else 1
    drawn = [draw_defects(pixels, seed=seed + 1 + i) for i in range(draws)]
    return choose_candidate(candidates, pixels, drawn, preferred=preferred).model
