"""The model card of an inspection model, with the figures that its file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmaf.inspection.calibration import Calibration
from fastmaf.io.model_card import TO_FILL_IN, ModelCard
from fastmaf.io.wording import ordinal, percent

_CODE = """\
import fastmaf

detector = fastmaf.Detector.load({file!r})
print(detector.offset_)  # decision_function is -score - offset_; below 0 an image is anomalous
# detector.predict(paths) returns -1 for anomalous images and 1 for normal ones
"""


def inspection_card(
    path: str | Path, shape: tuple[int, int], calibration: Calibration, about: Mapping[str, Any]
) -> ModelCard:
    """Returns the card of an inspection model, for ``InspectionModel.save``.

    Args:
        path: the file of the card.
        shape: height and width of the images in pixels.
        calibration: of the model.
        about: details of the training; what is missing is left out.
    """
    recipe = about.get("recipe", {})
    names = {"augmentation": "Augmentation", "rank": "Factors of the whitening", "folds": "Folds", "seed": "Seed"}
    colours, (height, width) = "grey" if recipe.get("channels") == 1 else "RGB", shape
    details = {"Images": f"{colours}, resized to {height} × {width} pixels"}
    details |= {text: f"{recipe[name]}" for name, text in names.items() if name in recipe}
    return _card(path, details, calibration, about)


def combined_card(
    path: str | Path, size: int, calibration: Calibration, about: Mapping[str, Any], names: Sequence[str]
) -> ModelCard:
    """Returns the card of a model of several parts with these names; other arguments as ``inspection_card``."""
    details = {
        "Class": "sum of the standardised scores of its parts" if len(names) > 1 else "model of reduced images",
        "Parts": ", ".join(names),
        "Images": f"RGB, resized to {size} × {size} pixels",
    }
    return _card(path, details, calibration, about)


def features_card(
    path: str | Path, size: int, calibration: Calibration, about: Mapping[str, Any], network: str
) -> ModelCard:
    """Returns the card of a model of the features of this network; other arguments as ``inspection_card``."""
    details = {
        "Class": "Gaussian of features",
        "Features": network,
        "Images": f"RGB, resized to {size} × {size} pixels",
    }
    return _card(path, details, calibration, about)


def texture_card(path: str | Path, size: int, calibration: Calibration, about: Mapping[str, Any]) -> ModelCard:
    """Returns the card of a texture model; arguments as ``inspection_card``."""
    details = {
        "Class": "density of local features at several scales",
        "Levels with blocks": ", ".join(about.get("texture_blocks", [])) or "none",
        "Images": f"resized to {size} × {size} pixels",
    }
    return _card(path, details, calibration, about)


def posed_card(path: str | Path, size: int, seen: int, calibration: Calibration, about: Mapping[str, Any]) -> ModelCard:
    """Returns the card of a model that sees turned images at this size; other arguments as ``inspection_card``."""
    details = {
        "Class": "a model of images that are turned to one pose first; what lies in their corners is not seen",
        "Images": f"resized to {size} × {size} pixels, turned, and resized to {seen} × {seen} pixels",
    }
    return _card(path, details, calibration, about)


def framed_card(
    path: str | Path, frame: tuple[int, int], size: int, calibration: Calibration, about: Mapping[str, Any]
) -> ModelCard:
    """Returns the card of a model of images in a frame of (height, width); others as ``inspection_card``."""
    height, width = frame
    details = {
        "Class": "a model of images of different shapes, which are laid into one frame and not distorted",
        "Images": f"laid into a frame of {height} × {width} pixels, which is resized to {size} × {size} pixels",
    }
    return _card(path, details, calibration, about)


def tiled_card(
    path: str | Path, size: int, tiles: int, calibration: Calibration, about: Mapping[str, Any]
) -> ModelCard:
    """Returns the card of a model of so many tiles along each side; other arguments as ``inspection_card``."""
    details = {
        "Class": f"{tiles} × {tiles} models, each of a tile; the score is the highest standardised score of a tile",
        "Images": f"resized to {size} × {size} pixels",
    }
    return _card(path, details, calibration, about)


def _card(
    path: str | Path, details: Mapping[str, str], calibration: Calibration, about: Mapping[str, Any]
) -> ModelCard:
    data = f"{about['images']:,} good images. " if "images" in about else ""
    return ModelCard(
        path,
        sections={
            "Intended use": "Finding images that deviate from normal ones, and where they do, in images of one kind of "
            f"object. {TO_FILL_IN} which object, and what is decided by the result.",
            "Training data": f"{data}{TO_FILL_IN} which camera, light and object, and the license of the images.",
            "Evaluation": f"{_evaluation(calibration, about)} {TO_FILL_IN} results on labelled images.",
            "Limitations": "The false-alarm rate holds for good images from the same process as the calibration "
            "images: recalibrate after a change of camera, light or material. "
            f"{TO_FILL_IN} which defects are missed.",
        },
        details=details,
        tags=("anomaly-detection", "visual-inspection"),
        code=_CODE,
    )


def _evaluation(calibration: Calibration, about: Mapping[str, Any]) -> str:
    nll = f"Mean NLL of held-out good images: {about['held_out_nll']:,.0f} nats. " if "held_out_nll" in about else ""
    kind = f"out-of-fold scores of {calibration.n:,} good images"
    if calibration.how == "split":
        kind = f"scores of {calibration.n:,} good images that the model was not fitted to"
    return (
        f"{nll}The threshold is {calibration.threshold:.6g}, the {ordinal(calibration.rank)} lowest of the {kind}. "
        f"Expected false-alarm rate: {percent(calibration.expected_rate)}."
    )
