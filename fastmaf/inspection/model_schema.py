"""The schema of an inspection model's metadata, as ``InspectionModel.save`` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from fastmaf.inspection.scoring.settings import Kind, Source
from fastmaf.io.safe_json import parse
from fastmaf.io.schema import Anything, ListOf, MapOf, Maybe, Number, OneOf, Record, SchemaError, Text, Whole

KEY = "inspection"  # of this record in a file's metadata

_LEAST = 1e-6
_LARGEST = 4096  # pixels: the widest Gaussian
_DEVIATION = Number(low=_LEAST, high=_LARGEST)
_WITHIN_FLOAT32 = Number(low=1e-30, high=1e30)

_SETTINGS = Record(
    {
        "kind": OneOf(get_args(Kind)),
        "source": OneOf(get_args(Source)),
        "presmooth_sigma": Number(low=0, high=_LARGEST),
        "sigma": _DEVIATION,
        "clip": _WITHIN_FLOAT32,
        "top": Number(above=0, high=1),
    }
)
_MAP_CONFIG = Record({"factors": Whole(), "power": Number(low=0, high=1), "sigma": _DEVIATION, "rms": _WITHIN_FLOAT32})
_CALIBRATION = Record(
    {
        "false_alarm": Number(low=1e-12, below=1),
        "confidence": Maybe(Number(above=0, below=1)),
        "how": OneOf(("k-fold", "split")),
        "folds": Maybe(Whole(2)),
        "created": Maybe(Text(60)),
        "source": Maybe(Text()),
    }
)
_RECIPE = Record(
    optional={
        "rank": Whole(),
        "blocks": Whole(),
        "steps": Whole(1),
        "folds": Whole(2),
        "seed": Whole(-(2**63), 2**64 - 1),
    },
    others=Anything(),
)
_ROW = Record({"step": Number(), "nll": Number(), "held_out_nll": Number()}, others=Anything())
# The figures of a training that a report shows; either all or none of them.
_TRAINING = {
    "recipe": _RECIPE,
    "held_out_nll": Number(),
    "held_out_nll_of_whitening": Number(),
    "images_of_folds": ListOf(Whole(1)),
    "held_out_nll_of_folds": ListOf(Number()),
}
_ABOUT = Record(
    {"map_levels": ListOf(Number(low=0, high=1e9), shortest=2, longest=2)},
    {
        **_TRAINING,
        "held_out_nll_of_augmentations": MapOf(Number()),
        "drawn_auroc": MapOf(Number()),
        "drawn_maps": MapOf(Number()),
        "seconds": MapOf(Number()),
        "log": ListOf(_ROW),
    },
    others=Anything(),
)
_MODEL = Record(
    {"settings": _SETTINGS, "map_config": _MAP_CONFIG, "nll": Number(), "calibration": _CALIBRATION, "about": _ABOUT}
)

# What files of earlier versions call the settings.
_OLD_NAMES = {
    "location": "map_config",
    "usual": "rms",
    "grain": "presmooth_sigma",
    "copies": "augmentation",
    "held_out_nll_of_augmentations": "held_out_nll_of_augmentations",
}


def inspection_record(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the record in a file's metadata with every value checked, under today's names.

    Raises:
        ValueError: a value is invalid; the message gives its path.
    """
    record: dict[str, Any] = _renamed(parse(metadata[KEY], KEY))
    _MODEL.check(record, KEY)
    presmooth = record["settings"]["presmooth_sigma"]
    if 0 < presmooth < _LEAST:
        raise SchemaError(f"{KEY}.settings.presmooth_sigma: expected 0 or at least {_LEAST:g}; found {presmooth}")
    about = record["about"]
    if "recipe" in about:
        Record(_TRAINING, others=Anything()).check(about, f"{KEY}.about")
        counts = len(about["images_of_folds"]), len(about["held_out_nll_of_folds"])
        if counts[0] != counts[1]:
            raise SchemaError(f"{KEY}.about.held_out_nll_of_folds: expected {counts[0]} numbers; found {counts[1]}")
    return record


def _renamed(value: Any, depth: int = 4) -> Any:
    if not isinstance(value, dict) or not depth:
        return value
    return {_OLD_NAMES.get(key, key): _renamed(item, depth - 1) for key, item in value.items()}
