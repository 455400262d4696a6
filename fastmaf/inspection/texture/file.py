"""Reading texture models from files, with every value checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.calibration import CALIBRATION, Calibration
from fastmaf.inspection.model_schema import ABOUT, KEY
from fastmaf.inspection.scoring.float64_flow import check_base
from fastmaf.inspection.texture.features import LEVELS, LONGEST, PATCH, TextureFilters
from fastmaf.inspection.texture.light import CONTEXT, Light
from fastmaf.inspection.texture.model import KIND, TextureModel
from fastmaf.inspection.texture.position import GRID, PositionStatistics
from fastmaf.io.checkpoint import read_with_extras
from fastmaf.io.safe_json import parse, shown
from fastmaf.io.schema import Flag, Number, OneOf, Record, Whole
from fastmaf.io.tensor_file import TensorFile

_LARGEST = 1e18
_MOST_FILTERS = 1024
_RECORD = Record(
    {
        "kind": OneOf((KIND,)),
        "size": Whole(1, 2**15),
        "levels": Whole(1, LEVELS),
        "map_unit": Number(low=1e-30, high=1e30),
        "calibration": CALIBRATION,
        "about": ABOUT,
    },
    {"light": Flag(), "longest": Whole(LONGEST, 2**15)},
)


def read_model(file: TensorFile, *, device: str = "cpu") -> TextureModel:
    """Reads what ``TextureModel.save`` wrote from an open file; see ``load_inspection``."""
    try:
        record: dict[str, Any] = parse(file.metadata[KEY], KEY)
        _RECORD.check(record, KEY)
        filters = _filters(file, record.get("light", False))
        shape = (record["levels"], GRID, GRID)
        positions = [_tensor(file, f"position_{name}", shape, torch.float32) for name in ("mean", "deviation")]
        parts = [_tensor(file, f"part_{name}", (LEVELS,), torch.float64) for name in ("mean", "deviation")]
        for name, deviation in (("position_deviation", positions[1]), ("part_deviation", parts[1])):
            if not bool((deviation >= 1 / _LARGEST).all()):
                raise ValueError(f"tensor {name}: expected numbers of at least {1 / _LARGEST:g}")
        scores = file.tensors.get("calibration_scores")
        if scores is None or scores.dtype != torch.float64:
            found = "nothing" if scores is None else scores.dtype
            raise ValueError(f"tensor calibration_scores: expected torch.float64; found {found}")
        calibration = Calibration.from_json(record["calibration"], file.read("calibration_scores").numpy())
        flows = tuple(_flow(file, level, filters, device) for level in range(record["levels"]))
    except fastmaf.CheckpointError:
        raise
    except ValueError as error:
        raise fastmaf.CheckpointError(f"{file.path}: {error}") from error
    return TextureModel(
        record["size"],
        filters.to(device),
        flows,
        tuple(PositionStatistics(*(t.to(device) for t in pair)) for pair in zip(*positions, strict=True)),
        parts[0].numpy(),
        parts[1].numpy(),
        float(record["map_unit"]),
        calibration,
        record["about"],
        record.get("longest", LONGEST),
    )


def _filters(file: TensorFile, has_light: bool) -> TextureFilters:
    shapes: Mapping[str, Any] = {name: info.shape for name, info in file.tensors.items()}
    count = dict(enumerate(shapes.get("filter_bias", ()))).get(1, 0)
    if not 1 <= count <= _MOST_FILTERS:
        raise ValueError(f"tensor filter_bias: expected ({LEVELS}, 1 to {_MOST_FILTERS}); found {shown(count)} filters")
    values = dict(enumerate(shapes.get("filter_weight", ()))).get(2, 0)
    if values not in (PATCH**2, 3 * PATCH**2):
        raise ValueError(f"tensor filter_weight: expected filters of 1 or 3 x {PATCH}² values; found {shown(values)}")
    weight = _tensor(file, "filter_weight", (LEVELS, count, values), torch.float32)
    light = None
    if has_light:
        light = Light(*_tensor(file, "light", (2, 2), torch.float32))
        if not bool((light.deviation >= 1 / _LARGEST).all()):
            raise ValueError(f"tensor light: expected deviations of at least {1 / _LARGEST:g}")
    return TextureFilters(weight, _tensor(file, "filter_bias", (LEVELS, count), torch.float32), light)


def _flow(file: TensorFile, level: int, filters: TextureFilters, device: str) -> fastmaf.Flow:
    flow = read_with_extras(file.within(f"{level}/"), device).flow
    context = 0 if filters.light is None else CONTEXT
    if flow.features != filters.features or flow.context_features not in (0, context):
        expected, found = f"{filters.features} features and a context of {context}", flow.context_features
        raise ValueError(f"flow of level {level}: expected {expected}; found {flow.features} and one of {found}")
    check_base(flow)
    return flow.eval().requires_grad_(False)


def _tensor(file: TensorFile, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Reads a tensor of this shape and dtype, whose numbers are finite and not too large to square."""
    info = file.tensors.get(name)
    if info is None or info.shape != shape or info.dtype != dtype:
        found = "nothing" if info is None else f"{shown(tuple(info.shape))} {info.dtype}"
        raise ValueError(f"tensor {name}: expected {shape} {dtype}; found {found}")
    values = file.read(name)
    if not bool((values.abs() <= _LARGEST).all()):
        raise ValueError(f"tensor {name}: expected finite numbers of at most {_LARGEST:g} in size")
    return values
