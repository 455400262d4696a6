"""A fit that takes a second, for tests."""

from __future__ import annotations

from fastmaf.inspection.recipe import Recipe

TINY = Recipe(size=16, rank=10, blocks=1, steps=5, batch_size=4, folds=3)


def silent(_: str) -> None: ...
