"""An inspection model as one ONNX graph, from the pixels of a batch of images of any size to the verdicts.

Values are float32, except for sums over all dimensions, scores and p-values, which are float64.
"""

from __future__ import annotations

import json
import math
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.export.graph_builder import ExportError, Graph, Value
from fastmaf.inspection.export.resize import resized
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.scoring.float64_flow import first_part
from fastmaf.inspection.scoring.score import TermStatistics, smoothing
from fastmaf.inspection.scoring.settings import ScoreSettings

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

_MEANING = (
    "fastmaf inspection model: feed 'image', uint8 [batch, height, width, 3], decoded RGB images of one size at full "
    "resolution, not resized, not normalised; EXIF rotation applied, transparency laid on white, 16-bit grey scaled to "
    "8 bits."
)


@fastmaf.torch_defaults()
def inspection_graph(model: InspectionModel) -> Any:
    """Returns the ``onnx.ModelProto`` of a model, opset 18.

    Input ``image``, uint8 [n, height, width, 3]. Outputs ``score`` (float64 [n]), ``map`` (float32 [n, s, s]), ``nll``
    (float64 [n], nats), ``p_value`` (float64 [n]) and ``anomalous`` (bool [n]).

    Raises:
        ExportError: onnx is missing, the flow holds a transform that cannot be exported, or the graph is too large.
    """
    graph, size, settings = Graph(), model.size, model.settings
    image = graph.input("image", "uint8", ["batch", "height", "width", 3], "R, G, B, rows from the top, 0 to 255")
    planes = resized(image, size)
    if model.channels == 1:  # see ``to_grey``; exact in float64
        weights = np.array([19595.0, 38470.0, 7471.0]).reshape(3, 1, 1)
        planes = (((planes * weights).sum(1) + 32768.0) / 65536.0).op("Floor")
    x = planes.cast("float32").reshape(0, model.flow.features) / 255.0
    shares, steps = _flow(model.flow, x)
    first, z = len(first_part(model.flow)) - 1, steps[-1]
    terms = shares + z * z * 0.5 + _HALF_LOG_2PI
    nll = terms.cast("float64").sum(1)
    if settings.source == "whitened":
        z = _smoothed(_planes(steps[first], model), settings.presmooth_sigma, size).reshape(0, model.flow.features)
        terms = z * z * 0.5
    score_map = _score_map(terms, model)
    score = _score(score_map, nll, model.statistics, settings, size)
    anomaly_map = _anomaly_map([x, *steps][first], steps[first], model)
    above = (graph.value(model.calibration.scores, "float64") >= score.reshape(0, 1)).cast("float64").sum(1)
    graph.output("score", score, ["batch"], "anomaly score: higher is more anomalous")
    graph.output(
        "map", anomaly_map, ["batch", size, size], "anomaly map, rows from the top; mean square 1 over good images"
    )
    graph.output("nll", nll, ["batch"], "negative log-likelihood of the resized image in nats")
    p_value = (above + 1.0) / (model.calibration.n + 1)
    graph.output("p_value", p_value, ["batch"], "share of good images expected to score at least as high")
    graph.output(
        "anomalous", score > model.calibration.threshold, ["batch"], "whether the score is above the threshold"
    )
    return graph.model("fastmaf_inspection", _MEANING, _properties(model), fastmaf.__version__)


def _properties(model: InspectionModel) -> dict[str, str]:
    calibration = model.calibration
    return {
        "fastmaf_version": fastmaf.__version__,
        "size": str(model.size),
        "score": json.dumps(vars(model.settings)),
        "map_config": json.dumps(vars(model.map_config)),
        "threshold": repr(calibration.threshold),
        "false_alarm": repr(calibration.false_alarm),
        "confidence": repr(calibration.confidence),
        "calibration": json.dumps(calibration.to_json()),
        "calibration_scores": str(calibration.n),
    }


def _flow(flow: fastmaf.Flow, x: Value) -> tuple[Value, list[Value]]:
    """Returns each dimension's share of -ladj, and z after each transform, ``[1, D]`` or ``[n, D]``."""
    shares = x.graph.value(np.zeros((1, flow.features)), "float32")
    steps = []
    for transform in flow.transforms:
        x, shares = _transformed(transform, x, shares)
        steps.append(x)
    return shares, steps


@singledispatch
def _transformed(step: Any, x: Value, shares: Value) -> tuple[Value, Value]:
    """Returns z, and the shares with those of the transform added, as ``forward_per_dim`` does; see ``_flow``."""
    known = ", ".join(kind.__name__ for kind in _transformed.registry if kind is not object)
    raise ExportError(f"a {type(step).__name__} cannot be exported to ONNX; expected one of {known}")


@_transformed.register
def _(step: fastmaf.GaussianWhitening, x: Value, shares: Value) -> tuple[Value, Value]:
    return _unexplained(step, (x - step.mean) / step.scale), shares + step.terms


def _unexplained(step: fastmaf.GaussianWhitening, y: Value, factors: int | None = None) -> Value:
    """Returns the residual of ``y`` after the first factors (None: all); see ``Whitening64.unexplained``."""
    variance = step.variance[:factors]
    if not len(variance):
        return y
    root = (1 + variance).sqrt()
    basis = y.graph.value(step.factors[:, :factors], "float32")  # one constant, used both as it is and transposed
    return y + ((y @ basis) * (-variance / (root * (1 + root)))).op("Gemm", basis, transB=1)


@_transformed.register
def _(step: fastmaf.Permutation, x: Value, shares: Value) -> tuple[Value, Value]:
    return x.take(step.permutation, axis=1), shares.take(step.permutation, axis=1)


@_transformed.register
def _(step: fastmaf.Logit, x: Value, shares: Value) -> tuple[Value, Value]:
    p = x * (1 - 2 * step.alpha) + step.alpha
    log, log_rest = p.op("Log"), (-p + 1.0).op("Log")
    return log - log_rest, shares + log + log_rest - math.log(1 - 2 * step.alpha)


@_transformed.register
def _(step: fastmaf.AffineAutoregressive, x: Value, shares: Value) -> tuple[Value, Value]:
    if step.affine_map is not None:
        raise ExportError(f"a block with affine_map={step.affine_map} cannot be exported")
    if not step.made.is_plain:
        raise ExportError(f"a block cannot be exported unless its hidden layers are plain ReLUs; found {step.made}")
    units = x
    for layer in step.made.layers[:-1]:
        units = units.op("Gemm", layer.dense_weight().float(), layer.bias, transB=1)
        units = units.op("Relu") if layer.activation == "relu" else units
    # Rows 2d and 2d + 1 are a dimension's shift and raw log-scale.
    weight, bias = step.made.output.dense_weight().float(), step.made.output.bias
    shift, raw = (units.op("Gemm", weight[i::2], bias[i::2], transB=1) for i in (0, 1))
    log_scale, bound = raw, step.log_scale_bound
    if bound is not None:
        log_scale = _bounded(raw, bound) if step.soft_bound else raw.op("Clip", -bound, bound)
    return (x - shift) * (-log_scale).op("Exp"), shares + log_scale


def _bounded(raw: Value, bound: float) -> Value:
    return (raw / bound).op("Tanh") * bound


@_transformed.register
def _(step: fastmaf.LocalAutoregressive, x: Value, shares: Value) -> tuple[Value, Value]:
    p, groups, (channels, height, width) = step.patch, len(step.order), step.shape
    # ONNX orders the channels of a patch by position, torch by channel.
    channel, position = step.order // p**2, step.order % p**2
    u = (
        x.reshape(0, channels, height, width)
        .op("SpaceToDepth", blocksize=p)
        .take(position * channels + channel, axis=1)
    )

    def convolved(value: Value, layer: Any, outputs: slice) -> Value:
        bias = None if layer.bias is None else layer.bias[outputs]
        if bias is not None and not layer.weight.numel():  # no hidden channels: no inputs
            return value.graph.value(bias.view(1, -1, 1, 1).expand(-1, -1, height // p, width // p), "float32")
        weight = (layer.weight * layer.mask)[outputs]
        return value.op("Conv", weight, *(() if bias is None else (bias,)), pads=[layer.kernel // 2] * 4)

    def pixels(value: Value) -> Value:
        back = value.take(step.order.argsort(), axis=1)
        return back.op("DepthToSpace", blocksize=p, mode="CRD").reshape(0, step.features)

    units = convolved(u, step.first, slice(None)).op("Relu") if step.hidden else u
    shift, raw = (convolved(units, step.second, slice(i, 2 * groups, 2)) for i in (0, 1))
    log_scale = _bounded(raw, step.log_scale_bound)
    z = (u - shift - convolved(u, step.linear, slice(None))) * (-log_scale).op("Exp")
    return pixels(z), shares + pixels(log_scale)


def _smoothed(planes: Value, sigma: float, size: int) -> Value:
    """Returns ``S @ planes @ S.T`` of ``[..., size, size]``; unchanged for sigma 0."""
    if sigma == 0:
        return planes
    matrix: Tensor = smoothing(size, sigma).to(torch.float32)
    return planes.graph.value(matrix, "float32") @ planes @ matrix.T


def _planes(values: Value, model: InspectionModel) -> Value:
    return values.reshape(0, model.channels, model.size, model.size)


def _score_map(terms: Value, model: InspectionModel) -> Value:
    settings, statistics = model.settings, model.statistics
    standard = (terms - statistics.mean) / statistics.deviation
    plain = _planes(standard.op("Clip", -settings.clip, settings.clip), model).sum(1)
    return _smoothed(plain, settings.sigma, model.size)


def _anomaly_map(x: Value, residual: Value, model: InspectionModel) -> Value:
    """Returns the anomaly map; ``x`` is the input of the whitening (or first transform), ``residual`` its output."""
    first, config, size = first_part(model.flow)[-1], model.map_config, model.size
    if isinstance(first, fastmaf.GaussianWhitening):
        y = _unexplained(first, (x - first.mean) / first.scale, config.factors)
        residual = y * first.scale**config.power
    squares = _planes(residual * residual, model).sum(1)
    return _smoothed(squares, config.sigma, size).op("Max", 0.0).op("Sqrt") / config.rms


def _score(score_map: Value, nll: Value, statistics: TermStatistics, settings: ScoreSettings, size: int) -> Value:
    if settings.kind == "nll":
        return nll
    if settings.kind == "typicality":
        return (nll - statistics.nll).op("Abs")
    values = score_map.cast("float64").reshape(0, size**2)
    if settings.kind == "map maximum":
        return values.op("ReduceMax", values.graph.value(np.array([1]), "int64"), keepdims=0)
    taken = max(1, round(settings.top * size**2))
    return values.op("TopK", values.graph.value(np.array([taken]), "int64"), outputs=2).sum(1) / taken
