"""A model of features in ONNX's operators: the network, the Gaussian, score and map."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import fastmaf
from fastmaf.inspection.export.graph_builder import ExportError, Value
from fastmaf.inspection.features.efficientnet_lite import OUTPUTS, Block, Convolution, EfficientNetLite0
from fastmaf.inspection.features.gaussian import LocationGaussian
from fastmaf.inspection.features.maps import SIGMA, count_top
from fastmaf.inspection.features.model import FeatureModel
from fastmaf.inspection.scoring.score import smoothing

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def feature_results(model: FeatureModel, planes: Value) -> tuple[Value, Value, Value]:
    """Returns scores, maps and NLLs of images, float64 ``[n, 3, size, size]``, whole numbers from 0 to 255.

    Raises:
        ExportError: the network is one of the user's.
    """
    network = model.extractor.network
    if not isinstance(network, EfficientNetLite0):
        raise ExportError(
            f"features of {model.extractor.label} cannot be exported; expected those of EfficientNetLite0"
        )
    features = _features(network, planes, model.size, model.grid[0])
    distances = _distances(model.gaussian, features)
    statistics, locations = model.statistics, len(model.statistics.mean)
    double = distances.cast("float64")
    above = double - statistics.mean
    taken = count_top(locations)
    largest = (above / statistics.deviation).op("TopK", planes.graph.value(np.array([taken]), "int64"), outputs=2)
    down, across = (_enlarging(side, model.size) for side in model.grid)
    grid = above.cast("float32").reshape(0, *model.grid)
    anomaly_map = planes.graph.value(down, "float32") @ grid @ across.T / model.map_unit
    constant = float(model.gaussian.nll(torch.zeros(1, locations))[0])
    nll = double.sum(1) if model.gaussian.flow is not None else (double * double * 0.5).sum(1)
    return largest.sum(1) / taken, anomaly_map, nll + constant


def _features(network: EfficientNetLite0, planes: Value, size: int, grid: int) -> Value:
    """Returns the features ``[n, C, grid, grid]``."""
    x, side = _convolved(network.stem, (planes.cast("float32") - 127.0) / 128.0, size)
    maps: list[Value] = []
    for i, stage in enumerate(network.stages):
        for block in stage.modules():
            if isinstance(block, Block):
                x, side = _block(block, x, side)
        if i in OUTPUTS:
            cells = side // grid
            maps.append(x.op("AveragePool", kernel_shape=[cells] * 2, strides=[cells] * 2) if cells > 1 else x)
    return maps[0].op("Concat", *maps[1:], axis=1)


def _block(block: Block, x: Value, side: int) -> tuple[Value, int]:
    y, after = x, side
    for layer in block.modules():
        if isinstance(layer, Convolution):
            y, after = _convolved(layer, y, after)
    return (y + x if block.shortcut else y), after


def _convolved(layer: Convolution, x: Value, side: int) -> tuple[Value, int]:
    """Returns the result of a layer, and its side."""
    before, after = layer.padding(side)
    y = x.op(
        "Conv",
        layer.weight,
        layer.bias,
        group=layer.groups,
        strides=[layer.stride] * 2,
        pads=[before, before, after, after],
    )
    return (y.op("Clip", 0.0, 6.0) if layer.relu6 else y), math.ceil(side / layer.stride)


def _distances(gaussian: LocationGaussian, features: Value) -> Value:
    """Returns what ``LocationGaussian.distances`` does, ``[n, L]``."""
    channels = gaussian.mean.shape[1]
    y = features.reshape(0, channels, -1).transpose(0, 2, 1) - gaussian.mean
    z = (features.graph.value(gaussian.factor, "float32") @ y.reshape(0, -1, channels, 1)).reshape(0, -1, channels)
    if gaussian.flow is None:
        return (z * z).sum(2).op("Sqrt")
    assert gaussian.positions is not None
    total = z.graph.value(np.full((1, len(gaussian.positions)), channels * _HALF_LOG_2PI), "float32")
    for step in gaussian.flow.transforms:
        z, log_scale = _conditional(step, z, gaussian.positions)
        total = total + log_scale.sum(2)
    return (z * z * 0.5).sum(2) + total


def _conditional(step: object, x: Value, context: Tensor) -> tuple[Value, Value]:
    """Returns the result of a block of a MAF and its log-scales, ``[n, L, C]``; the context is the same every time."""
    if not isinstance(step, fastmaf.AffineAutoregressive) or step.affine_map is not None or step.made.residual:
        raise ExportError(f"a flow of features with a {type(step).__name__} cannot be exported")
    made, bound = step.made, step.log_scale_bound
    if set(made.activations) != {"relu"} or bound is None or not step.soft_bound:
        raise ExportError(f"a flow of features cannot be exported unless its hidden layers are ReLUs; found {made}")
    units, (*terms, last) = x, made.context_terms(context)
    for layer, term in zip(made.layers[:-1], terms, strict=True):
        units = (units @ layer.dense_weight().float().T + (layer.bias + term)).op("Relu")
    weight, bias = made.output.dense_weight().float(), made.output.bias
    shift, raw = (units @ weight[i::2].T + (bias[i::2] + last[:, i::2]) for i in (0, 1))
    log_scale = (raw / bound).op("Tanh") * bound
    return (x - shift) * (-log_scale).op("Exp"), log_scale


def _enlarging(side: int, size: int) -> Tensor:
    """Returns the matrix ``[size, side]`` that enlarges the columns of a map and smooths them."""
    columns = interpolate(torch.eye(side)[:, None], size, mode="linear", align_corners=False)[:, 0].T
    return smoothing(size, SIGMA * size).float() @ columns
