"""A model of objects at any angle: each image is turned to one pose, and then seen by a model of such images."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastmaf
from fastmaf.images.reduce import reduced
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.interface import AnomalyModel, OfPart
from fastmaf.inspection.map_shapes import squared
from fastmaf.inspection.model import Prediction, Shapes, check_pixels
from fastmaf.inspection.model_card import posed_card
from fastmaf.inspection.model_parts import read_parts, tensors_of_parts
from fastmaf.inspection.model_schema import KEY
from fastmaf.inspection.pose import ANGLES, RADII, Pose, common_pose, maps_turned_back, turned
from fastmaf.inspection.recipe import Recipe
from fastmaf.io.safe_json import parse, shown
from fastmaf.io.schema import Flag, OneOf, Record, Whole
from fastmaf.io.tensor_file import TensorFile, write_tensors

KIND = "posed"
_LARGEST = 8  # times the size of the part: images of 256 pixels for a part of 64, and some reserve
_RECORD = Record({"kind": OneOf((KIND,)), "size": Whole(1, 2**15), "moves": Flag()})


@dataclass(frozen=True, eq=False)
class PosedModel(OfPart):
    """A pose, and a model of images in this pose.

    Scores are those of the turned image; the anomaly map is turned back, and is 0 where the turned image shows nothing
    of the image: in corners.

    Attributes:
        pose: that each image is turned to.
        part: the model of turned images, of at most this size.
        size: side of the square images that it takes. They are turned at this size and then reduced: twice that of the
            part keeps fine structure.
    """

    pose: Pose
    part: AnomalyModel
    size: int

    def __post_init__(self) -> None:
        if not self.part.size <= self.size <= _LARGEST * self.part.size:
            most = _LARGEST * self.part.size
            raise ValueError(f"size must be at least that of the part, {self.part.size}, to {most}; found {self.size}")

    def seen(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns images, uint8 ``[n, 3, size, size]``, as the part sees them, and the places of their objects."""
        check_pixels(pixels, self.size)
        pixels = pixels.cpu()  # where images are turned; the part moves them to its device
        places = self.pose.places(pixels)
        return reduced(turned(pixels, places), self.part.size), places

    @fastmaf.torch_defaults()
    def predict(self, pixels: Tensor, shapes: Shapes | None = None, *, nll: bool = True) -> Prediction:
        """Returns scores, anomaly maps and NLLs of images, uint8 ``[n, 3, size, size]``; ``shapes`` are not used.

        The NLL is that of the turned image. Without ``nll``, these may be NaN.

        Raises:
            ValueError: the images have another size or type.
        """
        images, places = self.seen(pixels)
        prediction = self.part.predict(images, nll=nll)
        return replace(prediction, anomaly_maps=self.turned_back(prediction, places))

    def turned_back(self, prediction: Prediction, places: Tensor) -> Any:
        """Returns the maps of a prediction for turned images, float32 ``[n, size, size]``, as those of the images."""
        return maps_turned_back(squared(prediction.anomaly_maps, self.size), places)

    def with_calibration(self, calibration: Calibration) -> PosedModel:
        """Returns the same model with another calibration."""
        return replace(self, part=self.part.with_calibration(calibration))

    @fastmaf.torch_defaults()
    def save(self, path: str | Path, *, card: str | Path | None = None) -> None:
        """Writes the model to one safetensors file, and its model card to ``card``; see ``fastmaf.Flow.save``.

        A crash leaves the old file or the new one.
        """
        filled = None
        if card is not None:
            filled = posed_card(card, self.size, self.part.size, self.calibration, self.about)
            filled.check(path)
        tensors, metadata = tensors_of_parts([self.part], Path(path).resolve().parent)
        tensors["reference"] = self.pose.reference
        record = {"kind": KIND, "size": self.size, "moves": self.pose.moves}
        write_tensors(tensors, path, {KEY: json.dumps(record), **metadata})
        if filled is not None:
            filled.write(None, {}, Path(path))


class InPose(NamedTuple):
    """Good images in one pose.

    Attributes:
        pixels: uint8 ``[n, 3, s, s]``.
        double: the same at twice the size, or None.
        pose: that they were turned to.
        size: at which they were turned.
        reason: what says that they have this pose in common.
    """

    pixels: Tensor
    double: Tensor | None
    pose: Pose
    size: int
    reason: str

    def model(self, part: AnomalyModel) -> PosedModel:
        """Returns the model of images as they come, for a model of these."""
        return PosedModel(self.pose, part, self.size)


def in_one_pose(pixels: Tensor, double: Tensor | None, recipe: Recipe) -> InPose | None:
    """Returns good images turned to one pose, or None where they are fitted as they are.

    They are fitted as they are if they have no pose in common, see ``fastmaf.inspection.pose.common_pose``, if they are
    not square, or if the recipe has ``pose="none"`` or names an augmentation.

    Args:
        pixels: uint8 ``[n, 3, s, s]``.
        double: uint8 ``[n, 3, 2 s, 2 s]``, which are turned and then reduced; None to turn ``pixels``.
        recipe: of the fit.
    """
    if recipe.pose == "none" or recipe.augmentation != "auto" or recipe.shape[0] != recipe.shape[1]:
        return None
    largest = pixels if double is None else double
    if (common := common_pose(largest)) is None:
        return None
    images = turned(largest, common.pose.places(largest))
    small = reduced(images, pixels.shape[-1])
    return InPose(small, None if double is None else images, common.pose, largest.shape[-1], common.reason)


def read_model(file: TensorFile, *, device: str = "cpu") -> PosedModel:
    """Reads what ``PosedModel.save`` wrote from an open file; see ``load_inspection``."""
    try:
        record = parse(file.metadata[KEY], KEY)
        _RECORD.check(record, KEY)
        expected = (ANGLES, RADII)
        if "reference" not in file.tensors:
            raise ValueError("tensor reference: expected one; found nothing")
        found = file.tensors["reference"]
        if found.dtype != torch.float64 or tuple(found.shape) != expected:
            raise ValueError(
                f"tensor reference: expected torch.float64 {expected}; found {found.dtype} {shown(found.shape)}"
            )
        reference = file.read("reference")
        if not bool((reference.abs() <= 255).all() and reference.any()):  # differences of grey values
            raise ValueError("tensor reference: expected numbers from -255 to 255, not all of them 0")
        (part,) = read_parts(file, 1, KIND, device=device)
        return PosedModel(Pose(reference, record["moves"]), part, record["size"])
    except fastmaf.CheckpointError:
        raise
    except ValueError as error:
        raise fastmaf.CheckpointError(f"{file.path}: {error}") from error
