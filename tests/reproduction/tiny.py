"""Settings and images of a reproduction that takes a second."""

from __future__ import annotations

import functools

from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings

TINY = TrainConfig(
    size=8, blocks=2, hidden_features=(16, 16), epochs=1, batch_size=4, lr=1e-3, degrees="random", holdout=0.0, seed=1
)
RECIPE = Recipe(
    size=8, rank=4, augmentation="none", blocks=0, folds=3, score=ScoreSettings(), map_config=AnomalyMapConfig()
)

draw_tiny = functools.partial(
    draw_dataset, train=8, good=3, defects={"crack": 2, "poke": 1, "squeeze": 2}, size=32, seed=0
)
