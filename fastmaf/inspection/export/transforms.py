"""The transforms of a flow as operators of an ONNX graph."""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

import numpy as np

import fastmaf
from fastmaf.inspection.export.graph_builder import ExportError, Value


def flow_steps(flow: fastmaf.Flow, x: Value) -> tuple[Value, list[Value]]:
    """Returns each dimension's share of -ladj, and z after each transform; ``[1, D]`` or ``[n, D]``."""
    shares = x.graph.value(np.zeros((1, flow.features)), "float32")
    steps = []
    for transform in flow.transforms:
        x, shares = _transformed(transform, x, shares)
        steps.append(x)
    return shares, steps


@singledispatch
def _transformed(step: Any, x: Value, shares: Value) -> tuple[Value, Value]:
    """Returns z, and the shares with those of the transform added, as ``forward_per_dim`` does; see ``flow_steps``."""
    known = ", ".join(kind.__name__ for kind in _transformed.registry if kind is not object)
    raise ExportError(f"a {type(step).__name__} cannot be exported to ONNX; expected one of {known}")


@_transformed.register
def _(step: fastmaf.GaussianWhitening, x: Value, shares: Value) -> tuple[Value, Value]:
    return unexplained(step, (x - step.mean) / step.scale), shares + step.terms


def unexplained(step: fastmaf.GaussianWhitening, y: Value, factors: int | None = None) -> Value:
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
