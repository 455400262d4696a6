"""A model of images of different shapes: each is laid into one frame, and then seen by a model of such images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

import fastmaf
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.interface import AnomalyModel, OfPart
from fastmaf.inspection.letterbox import Letterbox, letterboxed, maps_of_images
from fastmaf.inspection.model import Prediction, Shapes, check_pixels
from fastmaf.inspection.model_card import framed_card
from fastmaf.inspection.model_parts import read_parts, tensors_of_parts
from fastmaf.inspection.model_schema import KEY
from fastmaf.inspection.posed import PosedModel
from fastmaf.io.safe_json import parse
from fastmaf.io.schema import Flag, OneOf, Record, Whole
from fastmaf.io.tensor_file import TensorFile, write_tensors

KIND = "framed"
_LONGEST = 2**24  # pixels of a side of a frame; no image is larger
_RECORD = Record(
    {"kind": OneOf((KIND,)), "height": Whole(1, _LONGEST), "width": Whole(1, _LONGEST), "enlarges": Flag()}
)


@dataclass(frozen=True, eq=False)
class FramedModel(OfPart):
    """A frame, and a model of images that lie in it; see ``fastmaf.inspection.letterbox``.

    The anomaly map is that of the image, without the rest of the frame. The score is that of the whole frame: where the
    image does not reach, the model sees its border, repeated.

    Attributes:
        box: the frame.
        part: the model of framed images, resized to squares.
    """

    box: Letterbox
    part: AnomalyModel

    @property
    def size(self) -> int:
        """Side of the square images that it takes."""
        return self.part.size

    def seen(self, pixels: Tensor, shapes: Shapes | None) -> Tensor:
        """Returns images, uint8 ``[n, 3, size, size]``, as the part sees them; arguments as of ``predict``."""
        return letterboxed(pixels, self._shapes(pixels, shapes), self.box)

    def maps_of(self, pixels: Tensor, shapes: Shapes | None, maps: np.ndarray) -> np.ndarray:
        """Returns maps of framed images as those of the images alone; arguments as of ``predict``."""
        return maps_of_images(maps, self._shapes(pixels, shapes), self.box)

    def _shapes(self, pixels: Tensor, shapes: Shapes | None) -> Sequence[tuple[int, int]]:
        check_pixels(pixels, self.size)
        if shapes is None:
            return [(max(self.box.height, self.box.width),) * 2] * len(pixels)
        if len(shapes) != len(pixels):
            raise ValueError(f"shapes must hold that of each of {len(pixels)} images; found {len(shapes)}")
        return shapes

    @fastmaf.torch_defaults()
    def predict(self, pixels: Tensor, shapes: Shapes | None = None, *, nll: bool = True) -> Prediction:
        """Returns scores, anomaly maps and NLLs of images, uint8 ``[n, 3, size, size]``.

        The NLL is that of the framed image. Without ``nll``, these may be NaN.

        Args:
            pixels: the images.
            shapes: (height, width) of each before it became square; None: all were squares as large as the frame.
            nll: whether the NLLs are needed.

        Raises:
            ValueError: the images have another size or type, or there is another number of shapes.
        """
        prediction = self.part.predict(self.seen(pixels, shapes), nll=nll)
        return replace(prediction, anomaly_maps=self.maps_of(pixels, shapes, prediction.anomaly_maps))

    def with_calibration(self, calibration: Calibration) -> FramedModel:
        """Returns the same model with another calibration."""
        return replace(self, part=self.part.with_calibration(calibration))

    @fastmaf.torch_defaults()
    def save(self, path: str | Path, *, card: str | Path | None = None) -> None:
        """Writes the model to one safetensors file, and its model card to ``card``; see ``fastmaf.Flow.save``.

        A crash leaves the old file or the new one.
        """
        filled = None
        if card is not None:
            filled = framed_card(card, (self.box.height, self.box.width), self.size, self.calibration, self.about)
            filled.check(path)
        tensors, metadata = tensors_of_parts([self.part], Path(path).resolve().parent)
        write_tensors(tensors, path, {KEY: json.dumps({"kind": KIND, **self.box._asdict()}), **metadata})
        if filled is not None:
            filled.write(None, {}, Path(path))


def seen_by(model: AnomalyModel) -> AnomalyModel:
    """Returns the model of framed and turned images in a model, or the model itself."""
    return seen_by(model.part) if isinstance(model, (FramedModel, PosedModel)) else model


def read_model(file: TensorFile, *, device: str = "cpu") -> FramedModel:
    """Reads what ``FramedModel.save`` wrote from an open file; see ``load_inspection``."""
    try:
        record = parse(file.metadata[KEY], KEY)
        _RECORD.check(record, KEY)
        (part,) = read_parts(file, 1, KIND, device=device)
        return FramedModel(Letterbox(record["height"], record["width"], record["enlarges"]), part)
    except fastmaf.CheckpointError:
        raise
    except ValueError as error:
        raise fastmaf.CheckpointError(f"{file.path}: {error}") from error
