"""An inspection model as one ONNX graph, from the pixels of a batch of images of any size to the verdicts.

Values are float32, except for sums over all dimensions, scores and p-values, which are float64.
"""

from __future__ import annotations

import json
import math
import operator
from functools import reduce, singledispatch
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.combined import CombinedModel
from fastmaf.inspection.export.features import feature_results
from fastmaf.inspection.export.framing import extent_of, framed, maps_of_images
from fastmaf.inspection.export.graph_builder import ExportError, Graph, Value
from fastmaf.inspection.export.pose import grey, maps_turned_back, place_of, turned
from fastmaf.inspection.export.resize import resized
from fastmaf.inspection.export.transforms import flow_steps, unexplained
from fastmaf.inspection.features.model import FeatureModel
from fastmaf.inspection.framed import FramedModel, seen_by
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.map_shapes import squared
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.posed import PosedModel
from fastmaf.inspection.scoring.float64_flow import first_part
from fastmaf.inspection.scoring.score import LEAST_LEVEL, Shape, TermStatistics, smoothing
from fastmaf.inspection.scoring.settings import ScoreSettings
from fastmaf.inspection.texture.model import TextureModel
from fastmaf.inspection.tiled import TiledModel
from fastmaf.inspection.tiles import stride_of, tile_weights

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

_MEANING = (
    "fastmaf inspection model: feed 'image', uint8 [batch, height, width, 3], decoded RGB images of one size at full "
    "resolution, not resized, not normalised; EXIF rotation applied, transparency laid on white, 16-bit grey scaled to "
    "8 bits."
)


class _Results(NamedTuple):
    score: Value
    anomaly_map: Value
    nll: Value


@fastmaf.torch_defaults()
def inspection_graph(model: AnomalyModel) -> Any:
    """Returns the ``onnx.ModelProto`` of a model, opset 18.

    Input ``image``, uint8 [n, height, width, 3]. Outputs ``score`` (float64 [n]), ``map`` (float32 [n, s, s]), ``nll``
    (float64 [n], nats), ``p_value`` (float64 [n]) and ``anomalous`` (bool [n]).

    Raises:
        ExportError: onnx is missing, the model or its flow is of a kind that cannot be exported, or the graph is too
            large.
    """
    graph, size = Graph(), model.size
    image = graph.input("image", "uint8", ["batch", "height", "width", 3], "R, G, B, rows from the top, 0 to 255")
    if isinstance(model, FramedModel):
        extent = extent_of(model.box, image, size)
        score, maps, nll = _results(model.part, framed(resized(image, size), extent, size))
        anomaly_map = maps_of_images(maps, extent, size)
    else:
        score, anomaly_map, nll = _results(model, resized(image, size))
    above = (graph.value(model.calibration.scores, "float64") >= score.reshape(0, 1)).cast("float64").sum(1)
    graph.output("score", score, ["batch"], "anomaly score: higher is more anomalous")
    graph.output("map", anomaly_map, ["batch", size, size], "anomaly map; mean square 1 over good images")
    graph.output("nll", nll, ["batch"], "negative log-likelihood of the resized image in nats")
    p_value = (above + 1.0) / (model.calibration.n + 1)
    graph.output("p_value", p_value, ["batch"], "share of good images expected to score at least as high")
    anomalous = score > model.calibration.threshold
    graph.output("anomalous", anomalous, ["batch"], "whether the score is above the threshold")
    return graph.model("fastmaf_inspection", _MEANING, _properties(model), fastmaf.__version__)


@singledispatch
def _results(model: Any, planes: Value) -> _Results:
    """Returns scores, maps and NLLs of images, float64 ``[n, 3, size, size]``, whole numbers from 0 to 255."""
    known = ", ".join(kind.__name__ for kind in _results.registry if kind not in (object, TextureModel))
    raise ExportError(f"a {type(model).__name__} cannot be exported to ONNX; expected one of {known}")


@_results.register
def _(model: InspectionModel, planes: Value) -> _Results:
    settings, shape = model.settings, model.shape
    if shape[0] != shape[1]:
        planes = resized(planes.transpose(0, 2, 3, 1), shape)
    if model.channels == 1:
        planes = grey(planes)
    x = planes.cast("float32").reshape(0, model.flow.features) / 255.0
    shares, steps = flow_steps(model.flow, x)
    first, z = len(first_part(model.flow)) - 1, steps[-1]
    terms = shares + z * z * 0.5 + _HALF_LOG_2PI
    nll = terms.cast("float64").sum(1)
    if settings.source != "flow":
        z = _smoothed(_planes(steps[first], model), settings.presmooth_sigma, shape)
        squares = z * z
        terms = squares.sum(1).op("Sqrt") if settings.source == "pixels" else squares * 0.5
        terms = terms.reshape(0, len(model.statistics.mean))
        if settings.source == "pixels" and settings.level_power:
            level = (terms.sum(1) / math.prod(shape)).op("Max", LEAST_LEVEL).op("Pow", settings.level_power)
            terms = terms / level.reshape(0, 1)
    score_map = _score_map(terms, model)
    score = _score(score_map, nll, model.statistics, settings, math.prod(shape))
    anomaly_map = _anomaly_map([x, *steps][first], steps[first], model)
    return _Results(score, _squared(anomaly_map, shape, model.size), nll)


@_results.register
def _(model: CombinedModel, planes: Value) -> _Results:
    scores, maps, nlls = [], [], []
    for part, standard in zip(model.parts, model.standards, strict=True):
        small = planes if part.size == model.size else resized(planes.transpose(0, 2, 3, 1), part.size)
        score, anomaly_map, nll = _results(part, small)
        scores.append((score - standard.mean) / standard.deviation)
        maps.append(_squared(anomaly_map, (part.size, part.size), model.size) / standard.map_unit)
        nlls.append(nll)
    return _Results(reduce(operator.add, scores), reduce(operator.add, maps), nlls[0])


@_results.register
def _(model: TiledModel, planes: Value) -> _Results:
    graph, size, stride = planes.graph, model.parts[0].size, stride_of(model.parts[0].size)
    weights = tile_weights(size, model.tiles)
    # Each matrix places the weighted columns of a tile's map in those of the image.
    placing = [np.diag(row[k * stride : k * stride + size]) for k, row in enumerate(weights)]
    placing = [
        np.pad(matrix, ((k * stride, model.size - size - k * stride), (0, 0))) for k, matrix in enumerate(placing)
    ]
    scores, maps, nlls = [], [], []
    for i, part in enumerate(model.parts):
        row, column = divmod(i, model.tiles)
        tile = planes.take(np.arange(row * stride, row * stride + size), axis=2)
        tile = tile.take(np.arange(column * stride, column * stride + size), axis=3)
        score, anomaly_map, nll = _results(part, tile)
        scores.append((score - model.mean[i]) / model.deviation[i])
        maps.append(graph.value(placing[row], "float32") @ anomaly_map @ placing[column].T)
        nlls.append(nll)
    highest = reduce(lambda a, b: a.op("Max", b), scores)
    return _Results(highest, reduce(operator.add, maps), reduce(operator.add, nlls))


@_results.register
def _(model: TextureModel, planes: Value) -> _Results:
    raise ExportError(
        "a TextureModel cannot be exported to ONNX, as its computation depends on the shape of each image: score with "
        "'fastmaf inspect score' or 'fastmaf inspect serve', or fit with --kind object for a model that can be exported"
    )


@_results.register
def _(model: PosedModel, planes: Value) -> _Results:
    size, small = model.size, model.part.size
    place = place_of(model.pose, planes, size)
    images = turned(planes, place, size)
    score, anomaly_map, nll = _results(
        model.part, images if small == size else resized(images.transpose(0, 2, 3, 1), small)
    )
    return _Results(score, maps_turned_back(_squared(anomaly_map, (small, small), size), place, size), nll)


@_results.register
def _(model: FeatureModel, planes: Value) -> _Results:
    return _Results(*feature_results(model, planes))


def _squared(maps: Value, shape: Shape, size: int) -> Value:
    """Returns maps of this shape as ``squared`` does."""
    if shape == (size, size):
        return maps
    down, across = (_enlarging(side, size) for side in shape)
    return maps.graph.value(down, "float32") @ maps @ across.T


def _enlarging(side: int, size: int) -> Tensor:
    """Returns the matrix ``[size, side]`` that enlarges the columns of a map as ``squared`` does."""
    columns = np.repeat(np.eye(side, dtype=np.float32)[:, :, None], side, axis=2)  # [column, side, side], rows equal
    return torch.from_numpy(squared(columns, size)[:, :, 0].T.copy())


def _properties(model: AnomalyModel) -> dict[str, str]:
    calibration, size, settings = model.calibration, model.size, dict[str, str]()
    model = seen_by(model)
    if isinstance(model, InspectionModel):
        settings = {"score": json.dumps(vars(model.settings)), "map_config": json.dumps(vars(model.map_config))}
    elif isinstance(model, CombinedModel):
        settings = {"parts": json.dumps([vars(standard) for standard in model.standards])}
    return {
        "fastmaf_version": fastmaf.__version__,
        "size": str(size),
        **settings,
        "threshold": repr(calibration.threshold),
        "false_alarm": repr(calibration.false_alarm),
        "confidence": repr(calibration.confidence),
        "calibration": json.dumps(calibration.to_json()),
        "calibration_scores": str(calibration.n),
    }


def _smoothed(planes: Value, sigma: float, shape: Shape) -> Value:
    """Returns planes ``[..., h, w]`` smoothed along both axes; unchanged for sigma 0."""
    if sigma == 0:
        return planes
    down, across = (smoothing(side, sigma).to(torch.float32) for side in shape)
    return planes.graph.value(down, "float32") @ planes @ across.T


def _planes(values: Value, model: InspectionModel) -> Value:
    return values.reshape(0, model.channels, *model.shape)


def _score_map(terms: Value, model: InspectionModel) -> Value:
    settings, statistics = model.settings, model.statistics
    standard = (terms - statistics.mean) / statistics.deviation
    clipped = standard.op("Clip", -settings.clip, settings.clip)
    planes = 1 if settings.source == "pixels" else model.channels  # not -1: a batch may be empty
    plain = clipped.reshape(0, planes, *model.shape).sum(1)
    return _smoothed(plain, settings.sigma, model.shape)


def _anomaly_map(x: Value, residual: Value, model: InspectionModel) -> Value:
    """Returns the anomaly map; ``x`` is the input of the whitening (or first transform), ``residual`` its output."""
    first, config = first_part(model.flow)[-1], model.map_config
    if isinstance(first, fastmaf.GaussianWhitening):
        y = unexplained(first, (x - first.mean) / first.scale, config.factors)
        residual = y * first.scale**config.power
    squares = _planes(residual * residual, model).sum(1)
    return _smoothed(squares, config.sigma, model.shape).op("Max", 0.0).op("Sqrt") / config.rms


def _score(score_map: Value, nll: Value, statistics: TermStatistics, settings: ScoreSettings, pixels: int) -> Value:
    if settings.kind == "nll":
        return nll
    if settings.kind == "typicality":
        return (nll - statistics.nll).op("Abs")
    values = score_map.cast("float64").reshape(0, pixels)
    if settings.kind == "map maximum":
        return values.op("ReduceMax", values.graph.value(np.array([1]), "int64"), keepdims=0)
    taken = max(1, round(settings.top * pixels))
    return values.op("TopK", values.graph.value(np.array([taken]), "int64"), outputs=2).sum(1) / taken
