"""Models of objects and of textures, and which of the two kinds the good images call for.

Images that have their fine structure in common are those of an object; see ``fastmaf.inspection.texture.alignment``.
Otherwise both kinds are fitted, and synthetic defects decide, also on their combination: the texture is taken, unless
the other is better beyond chance, as the fine structure speaks for it; see
``fastmaf.inspection.selection.candidates``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

import fastmaf
from fastmaf.images.progress import Progress
from fastmaf.inspection.exchangeability import describe_groups
from fastmaf.inspection.free_threads import free_threads
from fastmaf.inspection.interface import HeldOut
from fastmaf.inspection.model import Shapes
from fastmaf.inspection.out_of_fold import group_folds, k_fold
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.texture.alignment import ALIGNED, alignment
from fastmaf.inspection.texture.candidate import TextureCandidate
from fastmaf.inspection.texture.fit import STAGES, fit_texture
from fastmaf.inspection.texture.model import TextureModel

Kind: TypeAlias = Literal["object", "texture", "auto"]
KINDS: tuple[Kind, ...] = ("auto", "object", "texture")

TEXTURE_SIZES = 256, 512, 1024
"""Sides of the square images that a texture is read as, from which it is brought back to its own aspect ratio."""

COMPARED = 512
"""The largest of these in a comparison with other kinds of models, whose synthetic defects are drawn onto squares."""

_MOST_BYTES = 2**31  # of good images: they are held in memory

_FOLDS = 5  # more would take longer; a density of patches of 80% of the images is much like that of all
_FEWEST = 20  # good images: below, a comparison of kinds says little


@dataclass(frozen=True, eq=False)
class FittedTexture:
    """A fitted texture model.

    Attributes:
        candidate: the models of all images and of the folds.
        seconds: duration of the fit.
        held_out: of the good images, one set.
    """

    candidate: TextureCandidate
    seconds: dict[str, float]
    held_out: HeldOut

    @property
    def model(self) -> TextureModel:
        """The calibrated model."""
        return self.candidate.fitted

    @property
    def log(self) -> list[dict[str, float]]:
        """Empty: the NLLs of the levels are in ``model.about``."""
        return []


@fastmaf.torch_defaults()
@free_threads()
def fit_texture_model(
    pixels: Tensor,
    recipe: Recipe | None = None,
    *,
    shapes: Shapes | None = None,
    groups: Sequence[str] | None = None,
    progress: bool = True,
) -> FittedTexture:
    """Fits a texture model to good images; of the recipe, folds and seed are used.

    Args:
        pixels: uint8 ``[n, 3, s, s]``.
        recipe: the settings.
        shapes: (height, width) of each image before it became square; None: all were square.
        groups: see ``fastmaf.inspection.fit.fit``.
        progress: show a progress bar.
    """
    recipe, started = recipe or Recipe(), time.perf_counter()
    count = min(recipe.folds, _FOLDS)
    folds = k_fold(len(pixels), count, recipe.seed) if groups is None else group_folds(groups, count)
    with Progress("fitting", "texture", total=len(folds) + STAGES, show=progress) as bar:
        candidate = fit_texture(pixels, folds, shapes=shapes, seed=recipe.seed, done=bar.update)
    if groups is not None:
        about, calibration = candidate.fitted.about, candidate.fitted.calibration
        about["groups"] = describe_groups(groups, candidate.good.scores[0], calibration)
    return FittedTexture(candidate, {"texture": time.perf_counter() - started}, candidate.good)


def texture_size(shapes: Shapes, largest: int = TEXTURE_SIZES[-1]) -> int:
    """Returns the side to read good images of these (height, width) at, so that most keep their resolution.

    A size serves images whose longer side is up to a quarter longer. Images that would take more than 2 GiB are read at
    a smaller one, at least at 512 pixels.

    Args:
        shapes: of the images.
        largest: of the sizes.

    Example:
        >>> from fastmaf.inspection.kinds import texture_size
        >>> texture_size([(200, 250)]), texture_size([(200, 250), (400, 300), (600, 300)])
        (256, 512)
        >>> texture_size([(512, 1024)] * 100), texture_size([(3000, 3000)] * 1000)
        (1024, 512)
    """
    longer = np.median([max(shape) for shape in shapes])
    sizes = [size for size in TEXTURE_SIZES if size <= largest]
    size = next((size for size in sizes if longer <= 1.25 * size), sizes[-1])
    while size > COMPARED and 3 * size**2 * len(shapes) > _MOST_BYTES:
        size //= 2
    return size


def reduction_of(shapes: Shapes, side: int) -> str | None:
    """Returns a message if most textures lose resolution where they are read as squares of this side, else None."""
    longer = float(np.median([max(shape) for shape in shapes]))
    if longer <= 1.25 * side:
        return None
    text = f"longer sides, {longer:.0f} pixels in the median, are reduced to {side}"
    return f"{text}: for finer defects, cut the images up"


def plausible_kind(pixels: Tensor) -> tuple[Kind, str]:
    """Returns ``"object"`` or, if both kinds are worth a comparison, ``"auto"``, and why.

    Args:
        pixels: good images of any size, uint8 ``[n, 3, s, s]``.
    """
    if len(pixels) < _FEWEST:
        return "object", f"object (at least {_FEWEST} good images are needed to compare it with a texture)"
    share = alignment(pixels)
    text = f"the mean image explains {max(share, 0.0):.0%} of the fine structure"
    if share >= ALIGNED:
        return "object", f"object ({text} of the others: they show the same thing at the same place)"
    return "auto", f"{text}, less than {ALIGNED:.0%}: not an object in one pose"


def describe_choice(model: Any, reason: str) -> str:
    """Returns the kind that was chosen by synthetic defects, with the reason for the comparison and its figures."""
    areas, chosen = model.about["drawn_auroc_of_candidates"], model.about["chosen"]
    names = chosen.split(" + ")
    texture, others = "texture" in names, [name for name in names if name != "texture"]
    kind = "texture" if texture and not others else "object and texture" if texture else "object"
    figures = ", ".join(f"{name} {value:.3f}" for name, value in areas.items())
    return f"{kind} ({reason}; image AUROC on synthetic defects: {figures})"
