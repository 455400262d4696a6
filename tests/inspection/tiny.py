"""A fit that takes a second, for tests."""

from __future__ import annotations

from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings

TINY = Recipe(
    size=16, rank=10, blocks=1, steps=5, batch_size=4, folds=3, score=ScoreSettings(), map_config=AnomalyMapConfig()
)


def silent(_: str) -> None: ...


A_REPORT = '<meta name="generator" content="fastmaf tests">'
"""What passes for a report of this software."""
