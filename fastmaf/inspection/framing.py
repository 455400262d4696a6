"""Whether good images of different shapes are laid into a frame, and which."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastmaf.images.reduce import reduced
from fastmaf.inspection.aspect import SQUARE, aspect_of
from fastmaf.inspection.framed import FramedModel
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.letterbox import Letterbox, letterboxed
from fastmaf.inspection.model import Shapes
from fastmaf.inspection.pose import common_pose, has_plain_corners
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.texture.alignment import ALIGNED, alignment

_SIDE = 64  # of the images that frames are compared on
_GAIN = 0.01  # of the share of fine structure: less is no reason


class Framing(NamedTuple):
    """A frame for good images, and the reason for it."""

    box: Letterbox
    reason: str

    def laid(self, pixels: Tensor, shapes: Shapes) -> Tensor:
        """Returns good images, read as squares, in the frame; see ``letterboxed``."""
        return letterboxed(pixels, shapes, self.box)

    def model(self, part: AnomalyModel) -> FramedModel:
        """Returns the model of images as they come, for a model of framed ones."""
        return FramedModel(self.box, part)


def framing_of(pixels: Tensor, shapes: Shapes, recipe: Recipe, *, is_object: bool = False) -> Framing | None:
    """Returns the frame that good images are laid into instead of being resized to one shape, or None.

    Frames are compared where aspect ratios differ: that of the median aspect ratio, which each image fills as far as it
    can, and one that all images fit into at the same scale. The fine structure that images have in common decides: a
    frame is used if the mean image explains more of it than without; see
    ``fastmaf.inspection.texture.alignment``. Images that are not square and have too little in common for an object are
    laid into a square where they show the same thing once they are turned; see ``fastmaf.inspection.pose``.

    Args:
        pixels: good images, uint8 ``[n, 3, s, s]``, each resized from its own shape.
        shapes: (height, width) of each before it became square.
        recipe: of the fit. With an ``aspect``, images are resized to it, and there is no frame.
        is_object: whether they are known to be of an object.
    """
    if recipe.aspect is not None or len(pixels) < 2:
        return None
    aspect = aspect_of(shapes)
    differ = any(not 1 / SQUARE <= height / width / aspect <= SQUARE for height, width in shapes)
    if not differ and aspect == 1:
        return None
    small = reduced(pixels, min(_SIDE, int(pixels.shape[-1])))
    before = alignment(small)
    largest = max(height for height, _ in shapes), max(width for _, width in shapes)
    if differ:
        longest = max(largest)
        median = max(1, round(longest * min(aspect, 1.0))), max(1, round(longest / max(aspect, 1.0)))
        boxes = Letterbox(*median, True), Letterbox(*largest, False)
        found = [(alignment(letterboxed(small, shapes, box)), box) for box in boxes]
        share, box = max(found, key=lambda pair: pair[0])
        if share > before + _GAIN and (is_object or share >= ALIGNED):
            text = f"the mean image explains {max(share, 0.0):.0%} of the fine structure of images laid into one frame"
            return Framing(box, f"{text}, {max(before, 0.0):.0%} of images resized to one shape")
    if before >= ALIGNED or recipe.pose == "none" or recipe.augmentation != "auto" or not has_plain_corners(small):
        return None
    square = Letterbox(max(largest), max(largest), False)
    common = common_pose(letterboxed(pixels, shapes, square))
    return None if common is None else Framing(square, common.reason)
