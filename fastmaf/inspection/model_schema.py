"""The schema of an inspection model's metadata, as ``InspectionModel.save`` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmaf.inspection.calibration import CALIBRATION
from fastmaf.inspection.scoring.settings import ANOMALY_MAP_CONFIG, SCORE_SETTINGS
from fastmaf.io.safe_json import parse
from fastmaf.io.schema import Anything, ListOf, MapOf, Maybe, Number, Record, SchemaError, Text, Whole

KEY = "inspection"  # of this record in a file's metadata

_SEED = Whole(-(2**63), 2**64 - 1)
_RECIPE = Record(
    optional={
        **{"rank": Whole(), "blocks": Whole(), "steps": Whole(1), "folds": Whole(2), "seed": _SEED},
        **{"augmentation": Text(), "shift_radius": Whole(), "shift_step": Number(), "angles": Whole(1)},
        "logit": Maybe(Number()),
        "channels": Whole(1),
        "size": Whole(1),
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
_MAPS = (
    *("drawn_auroc_of_candidates", "held_out_nll_of_augmentations", "drawn_auroc", "drawn_auroc_of_baselines"),
    "drawn_auroc_of_references",
    *("drawn_maps", "seconds", "drawn_auroc_of_gaussians", "held_out_nll_of_gaussians"),
)
_FEATURES = Record(
    {
        "network": Text(),
        "channels": Whole(1),
        "grid": ListOf(Whole(1), shortest=2, longest=2),
        "gaussian": Text(),
        "shrinkage": Maybe(Number(low=0, high=1)),
    }
)
ABOUT = Record(
    {"map_levels": ListOf(Number(low=0, high=1e9), shortest=2, longest=2)},
    {**_TRAINING, **dict.fromkeys(_MAPS, MapOf(Number())), "log": ListOf(_ROW), "features": _FEATURES},
    others=Anything(),
)
_MODEL = Record(
    {
        "settings": SCORE_SETTINGS,
        "map_config": ANOMALY_MAP_CONFIG,
        "nll": Number(),
        "calibration": CALIBRATION,
        "about": ABOUT,
    },
    {"shape": ListOf(Whole(1, 2**15), shortest=2, longest=2)},
)

# What files of earlier versions call the settings.
_OLD_NAMES = {
    "location": "map_config",
    "usual": "rms",
    "grain": "presmooth_sigma",
    "copies": "augmentation",
    "held_out_nll_of_copies": "held_out_nll_of_augmentations",
}


def inspection_record(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the record in a file's metadata with every value checked, under today's names.

    Raises:
        ValueError: a value is invalid; the message gives its path.
    """
    record: dict[str, Any] = _renamed(parse(metadata[KEY], KEY))
    _MODEL.check(record, KEY)
    record["settings"].setdefault("reference", "held-out")  # of earlier versions
    record["settings"].setdefault("level_power", 0.0)
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
