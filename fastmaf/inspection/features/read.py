"""Reading an inspection model of features from its file."""

from __future__ import annotations

import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.calibration import CALIBRATION, Calibration
from fastmaf.inspection.features import efficientnet_lite
from fastmaf.inspection.features.conditional import positions
from fastmaf.inspection.features.extractor import Extractor
from fastmaf.inspection.features.gaussian import LocationGaussian
from fastmaf.inspection.features.maps import DistanceStatistics
from fastmaf.inspection.features.model import FLOW, KIND, FeatureModel, unpacked
from fastmaf.inspection.model_schema import ABOUT, KEY
from fastmaf.inspection.scoring.float64_flow import check_base
from fastmaf.io.checkpoint import read_with_extras
from fastmaf.io.safe_json import parse
from fastmaf.io.schema import ListOf, Number, OneOf, Record, Whole
from fastmaf.io.tensor_file import TensorFile

_LARGEST = 1e18  # of a number; its square is finite in float32
_RECORD = Record(
    {
        "kind": OneOf((KIND,)),
        "features": OneOf((efficientnet_lite.NAME,)),
        "size": Whole(16, 2**15),
        "grid": ListOf(Whole(1, 2**10), shortest=2, longest=2),
        "map_unit": Number(low=1e-30, high=1e30),
        "calibration": CALIBRATION,
        "about": ABOUT,
    }
)


def read_model(file: TensorFile, *, device: str = "cpu") -> FeatureModel:
    """Reads what ``FeatureModel.save`` wrote from an open file, or from a part of one; see ``load_inspection``."""
    try:
        record = parse(file.metadata[KEY], KEY)
        _RECORD.check(record, KEY)
        scores = _tensor(file, "calibration_scores", None, dtype=torch.float64, finite=False)
        calibration = Calibration.from_json(record["calibration"], scores.numpy())
        network = _network(file)
        grid = (record["grid"][0], record["grid"][1])
        if record["size"] % 16 or grid != (record["size"] // 16,) * 2:
            raise ValueError(f"{KEY}.grid: expected the size over 16, twice; found {record['grid']}")
        channels = network.channels
        if file.tensors["mean"].shape[:1] not in ((1,), (grid[0] * grid[1],)):
            raise ValueError(f"tensor mean: expected a row per location or one; found {file.tensors['mean'].shape}")
        places = file.tensors["mean"].shape[0]
        mean = _tensor(file, "mean", (places, channels))
        factor = unpacked(_tensor(file, "factor", (places, channels * (channels + 1) // 2)), channels)
        if not bool((factor.diagonal(dim1=1, dim2=2) > 0).all()):
            raise ValueError("tensor factor: expected positive numbers on the diagonals")
        names, shape = ("distance_mean", "distance_deviation"), (grid[0] * grid[1],)
        usual, deviation = (_tensor(file, name, shape, dtype=torch.float64) for name in names)
        if not bool((deviation >= 1 / _LARGEST).all()):
            raise ValueError(f"tensor distance_deviation: expected at least {1 / _LARGEST:g}")
        flow = _flow(file, channels, device)
    except fastmaf.CheckpointError:
        raise
    except KeyError as error:
        raise fastmaf.CheckpointError(f"{file.path}: expected a tensor {error}; found none") from None
    except ValueError as error:
        raise fastmaf.CheckpointError(f"{file.path}: {error}") from error
    return FeatureModel(
        Extractor(network.to(device), record["features"], record["size"]),
        LocationGaussian(
            mean.to(device), factor.to(device), flow, None if flow is None else positions(grid).to(device)
        ),
        grid,
        DistanceStatistics(usual.to(device), deviation.to(device)),
        float(record["map_unit"]),
        calibration,
        record["about"],
    )


def _network(file: TensorFile) -> efficientnet_lite.EfficientNetLite0:
    network = efficientnet_lite.EfficientNetLite0().eval()
    for key, value in network.state_dict().items():
        value.copy_(_tensor(file, f"network.{key}", tuple(value.shape)))
    return network


def _flow(file: TensorFile, channels: int, device: str) -> fastmaf.Flow | None:
    """Returns the flow of the whitened features, if there is one."""
    if not any(name.startswith(FLOW) for name in file.tensors):
        return None
    flow = read_with_extras(file.within(FLOW)).flow.eval()
    if (flow.features, flow.context_features) != (channels, 2):
        found = f"{flow.features} features and {flow.context_features} context features"
        raise ValueError(f"expected a flow of {channels} features and 2 context features; found {found}")
    check_base(flow)
    return flow.to(device)


def _tensor(
    file: TensorFile,
    name: str,
    shape: tuple[int, ...] | None,
    *,
    dtype: torch.dtype = torch.float32,
    finite: bool = True,
) -> Tensor:
    """Returns a tensor, checked to be of this shape and dtype, and of numbers that neither overflow nor are NaN."""
    info = file.tensors[name]
    if info.dtype != dtype or (shape is not None and info.shape != shape):
        wanted = "" if shape is None else f"{shape} "
        raise ValueError(f"tensor {name}: expected {wanted}{dtype}; found {info.shape} {info.dtype}")
    values = file.read(name)
    if finite and not bool((values.abs() <= _LARGEST).all()):
        raise ValueError(f"tensor {name}: expected finite numbers of at most {_LARGEST:g} in size")
    return values
