"""The good images of a folder, at the sizes and in the frame that a fit needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmaf.images.dataset import ImageSet, load_train
from fastmaf.images.decode import DataError
from fastmaf.inspection.aspect import SQUARE, aspect_of, usable_side
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.fit import FALSE_ALARM
from fastmaf.inspection.framing import Framing, framing_of
from fastmaf.inspection.kinds import TEXTURE_SIZES, Kind, reduction_of, texture_size
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.sizes import SIZES, sides_for, sizes_for
from fastmaf.inspection.workflow.inputs import Say
from fastmaf.io.wording import count

NEEDED = Calibration(np.zeros(1), FALSE_ALARM, None, "split").min_samples  # images or groups, for the guarantee
_FEWEST = 5  # good images that are fitted with the default number of folds


class Loaded(NamedTuple):
    """Good images as they are fitted.

    Attributes:
        sizes: of the models of pixels.
        recipe: for the aspect ratio of the images.
        images: the images, in their frame if there is one.
        framing: the frame.
    """

    sizes: tuple[int, ...]
    recipe: Recipe
    images: ImageSet
    framing: Framing | None


def load_normals(data: str | Path, recipe: Recipe, kind: Kind, *, skip_bad: bool, progress: bool, say: Say) -> Loaded:
    """Returns the good images of a folder, and the recipe for their aspect ratio.

    Raises:
        DataError: there are too few.
    """
    options: Any = {"skip_bad": skip_bad, "double": True, "progress": progress}
    images = load_train(data, size=recipe.size, **options)
    recipe, framing = _for_aspect(recipe, images, kind, say)
    if recipe.side != images.size:
        images = load_train(data, size=recipe.side, **options)
    return _loaded((recipe.size,), recipe, images, framing, say)


def _for_aspect(recipe: Recipe, images: ImageSet, kind: Kind, say: Say) -> tuple[Recipe, Framing | None]:
    """Returns the recipe for the aspect ratio of good images, or of the frame that they are laid into."""
    if recipe.aspect is not None:
        return recipe, None
    is_object = kind == "object"
    framing = None if kind == "texture" else framing_of(images.pixels, images.shapes, recipe, is_object=is_object)
    aspect = aspect_of(images.shapes)
    recipe = replace(recipe, aspect=aspect if framing is None else framing.box.aspect)
    others = sum(not 1 / SQUARE <= height / width / aspect <= SQUARE for height, width in images.shapes)
    if others:
        height, width = recipe.shape
        what = f"{count(others, 'image')} of another aspect ratio than the median: as objects, all are"
        if framing is None:
            say(f"{what} resized to {height} x {width} pixels")
        else:
            box = framing.box
            say(
                f"{what} laid into a frame of {box.height} x {box.width} pixels, which is resized to {height} x {width}"
            )
    return recipe, framing


def _loaded(sizes: tuple[int, ...], recipe: Recipe, images: ImageSet, framing: Framing | None, say: Say) -> Loaded:
    images = _checked(images, recipe, say)
    if framing is not None:
        double = None if images.double is None else framing.laid(images.double, images.shapes)
        images = replace(images, pixels=framing.laid(images.pixels, images.shapes), double=double)
    return Loaded(sizes, recipe, images, framing)


def load_again(data: str | Path, images: ImageSet, size: int, *, skip_bad: bool, progress: bool, say: Say) -> ImageSet:
    """Returns images at another size, without their notes, which have been printed."""
    return images if images.size == size else load_train(data, size=size, skip_bad=skip_bad, progress=progress)


def load_sizes(
    data: str | Path, recipe: Recipe, kind: Kind, budget: float, *, skip_bad: bool, progress: bool, say: Say
) -> Loaded:
    """Returns the sizes to fit, none larger than an image of the folder, and the good images for the largest size."""
    options: Any = {"skip_bad": skip_bad, "double": True, "progress": progress}
    images = load_train(data, size=SIZES[1], **options)
    usable, (recipe, framing) = usable_side(images.shapes), _for_aspect(recipe, images, kind, say)
    wanted = sizes_for(usable, budget)
    if (side := sides_for(wanted, recipe)[-1]) != images.size:
        images = load_train(data, size=side, **options)
    if usable < 2 * wanted[-1]:  # enlarged images hold no finer shifts
        images = replace(images, double=None)
    return _loaded(wanted, recipe, images, framing, say)


def load_texture(data: str | Path, recipe: Recipe, *, skip_bad: bool, progress: bool, say: Say) -> ImageSet:
    """Returns the good images at the size that they need as a texture."""
    small = TEXTURE_SIZES[0]
    options: Any = {"skip_bad": skip_bad, "progress": progress}
    images = load_train(data, size=small, **options)
    if (side := texture_size(images.shapes)) != small:
        images = load_train(data, size=side, **options)
    if (reduction := reduction_of(images.shapes, side)) is not None:
        say(reduction)
    return _checked(images, recipe, say)


def load_for_features(
    data: str | Path,
    recipe: Recipe,
    kind: Kind,
    size: int,
    several: bool,
    budget: float,
    *,
    skip_bad: bool,
    progress: bool,
    say: Say,
) -> Loaded:
    """Returns the sizes of the models of pixels, and the good images, at least of the features' size."""
    images = load_train(data, size=size, skip_bad=skip_bad, progress=progress)
    recipe, framing = _for_aspect(recipe, images, kind, say)
    wanted = sizes_for(min(size, usable_side(images.shapes)), budget) if several else (recipe.size,)
    side = max(size, *sides_for(wanted, recipe))
    images = load_again(data, images, side, skip_bad=skip_bad, progress=progress, say=say)
    return _loaded(wanted, recipe, images, framing, say)


def _checked(images: ImageSet, recipe: Recipe, say: Say) -> ImageSet:
    for note in images.notes:
        say(note)
    needed = max(3, min(recipe.folds, _FEWEST))
    if len(images) < needed:
        skipped = f", and {count(len(images.skipped), 'file')} that cannot be read" if images.skipped else ""
        raise DataError(
            f"{images.paths[0].parent}: expected at least {needed} good images for fitting and calibration, better "
            f"some dozens; found {count(len(images), 'good image')}{skipped}: add images, or name another folder with "
            "--data"
        )
    if len(images) < NEEDED:
        say(
            f"{count(len(images), 'good image')}: a false-alarm rate of {FALSE_ALARM:.0%} cannot be guaranteed with "
            f"fewer than {NEEDED}; the highest score will be the threshold"
        )
    return images
