"""Callbacks that training reports to, for loggers such as TensorBoard and MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Callback(Protocol):
    """A function that training calls with its figures: ``callback(step, values)``.

    ``fastmaf.capsule.train.train`` calls it after each epoch, ``fastmaf.inspection.fit.fit`` (and the workflow of
    ``fastmaf inspect fit``) every ten steps of the local blocks of the first fold. It runs in the process and thread of
    the training, which waits for it; what it raises ends the training, after a checkpoint where there are any.

    Example:
        >>> import fastmaf.inspection.fit, torch
        >>> from fastmaf.inspection.recipe import Recipe
        >>> def show(step, values):
        ...     print(step, sorted(values))
        >>> images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
        >>> recipe = Recipe(size=8, rank=4, blocks=1, steps=10, folds=2, augmentation="none")
        >>> _ = fastmaf.inspection.fit.fit(images, recipe, callbacks=[show], progress=False)
        1 ['held_out_nll', 'nll']
        10 ['held_out_nll', 'nll']
    """

    def __call__(self, step: int, values: Mapping[str, float], /) -> object:
        """Receives the figures of one step.

        Args:
            step: of the epoch or step that has ended, from 1; a resumed run goes on counting.
            values: by name, such as ``"nll"`` (mean NLL of an image in nats) and ``"val_nll"``, ``"held_out_nll"``.
        """
        ...
