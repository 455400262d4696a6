"""``fastmaf inspect choose``: compare scores and anomaly maps on good images and synthetic defects."""

from __future__ import annotations

from pathlib import Path

import fastmaf
from fastmaf.images.reduce import reduced
from fastmaf.inspection.fit import fit
from fastmaf.inspection.posed import in_one_pose
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.inspection.selection.description import Selection
from fastmaf.inspection.selection.ranking import rank_maps, rank_scores
from fastmaf.inspection.workflow.inputs import Say
from fastmaf.inspection.workflow.load import load_normals


@fastmaf.torch_defaults()
def choose(
    data: str | Path,
    *,
    size: int = 64,
    draws: int = 3,
    seed: int = 0,
    skip_bad: bool = False,
    progress: bool = True,
    say: Say = print,
) -> Selection:
    """Ranks scores and maps on the good images of a folder and on synthetic defects."""
    recipe = Recipe(size=size, score=ScoreSettings(), map_config=AnomalyMapConfig(), seed=seed)
    _, recipe, images, _ = load_normals(data, recipe, "object", skip_bad=skip_bad, progress=progress, say=say)
    pixels, double = images.pixels, images.double
    if (posed := in_one_pose(pixels, double, recipe)) is not None:
        pixels, double = posed.pixels, posed.double
    models = fit(pixels, recipe, double=double, every_fold=True, progress=progress).out_of_fold
    pixels = reduced(pixels, recipe.shape)
    scores = rank_scores(pixels, models, draws=draws, seed=seed, progress=progress)
    maps = rank_maps(pixels, models, draws=draws, seed=seed, progress=progress)
    return Selection(len(images), draws, tuple(scores), tuple(maps))
