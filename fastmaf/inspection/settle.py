"""Which of two scores and two maps suits the objects at hand: what a fit decides by itself, on drawn defects.

Where objects lie at any angle, neighbouring residuals share their sign and no factor is to spare; see ``Recipe``. The
rule is that of ``fastmaf choose``, between few: the first is kept unless another is better beyond chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmaf.inspection.choose import choose
from fastmaf.inspection.choose_location import choose_location
from fastmaf.inspection.cross import CrossFit
from fastmaf.inspection.location import Location
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scores import ScoreSettings

SCORES = (ScoreSettings(), ScoreSettings(grain=0.7))
LOCATIONS = (Location(), Location(factors=800))

_ERRORS = 2.0  # so many standard errors of its mean AUROC another score has to be better
_GAIN = 0.01  # so much higher the mean of pixel AUROC and AU-PRO of another map has to be


def settled(recipe: Recipe, pixels: Tensor, cross: CrossFit) -> tuple[ScoreSettings, Location, Mapping[str, Any]]:
    """Returns the score and the map of a recipe, chosen where it leaves them open, and what was found of each.

    Args:
        recipe: as fitted.
        pixels: the normals, uint8 ``[n, 3, s, s]``.
        cross: the models of the folds.
    """
    said: dict[str, Any] = {}
    score, location = recipe.score, recipe.location
    if score is None:
        found = {
            one.settings: one
            for one in choose(pixels, cross, candidates=SCORES, draws=1, seed=recipe.seed, progress=False)
        }
        best = max(SCORES, key=lambda one: found[one].image_auroc)
        first = found[SCORES[0]]
        score = best if found[best].image_auroc > first.image_auroc + _ERRORS * first.error else SCORES[0]
        said["drawn_auroc"] = {f"grain {one.grain:g}": found[one].image_auroc for one in SCORES}
    if location is None:
        places = {
            one.location: one
            for one in choose_location(pixels, cross, candidates=LOCATIONS, draws=1, seed=recipe.seed, progress=False)
        }
        top = max(LOCATIONS, key=lambda one: places[one].mean)
        location = top if places[top].mean > places[LOCATIONS[0]].mean + _GAIN else LOCATIONS[0]
        said["drawn_maps"] = {f"{one.factors} factors": places[one].mean for one in LOCATIONS}
    return score, location, said
