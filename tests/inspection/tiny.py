"""A fit that takes a second, for tests."""

from __future__ import annotations

from fastmaf.inspection.location import Location
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scores import ScoreSettings

TINY = Recipe(size=16, rank=10, blocks=1, steps=5, batch_size=4, folds=3, score=ScoreSettings(), location=Location())


def silent(_: str) -> None: ...


A_REPORT = '<meta name="generator" content="fastmaf tests">'
"""What passes for a report of this software."""
