"""Calls of the native backend's functions as data: good arguments by name, of which tests break one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaf import kernels
from fastmaf.flows import Flow
from fastmaf.kernels import AffineArgs, AffineMap, FlowArgs, LinearArgs, flow_args
from fastmaf.kernels.adam.update import AdamNumbers, Update
from fastmaf.kernels.affine_output.args import AffineBatch
from fastmaf.kernels.flow.args import FlowBatch
from fastmaf.kernels.masked_linear.args import LinearBatch
from tests.core.helpers import blocks_of, build, normal
from tests.kernels.cases import permutations_of
from tests.tolerances import F32

NUMBERS = AdamNumbers(3, 1e-3, 0.9, 0.999, 1e-8, 0.1, False, False)
CALLS = [
    *(f"{op} {way}" for op in ("linear", "affine") for way in ("forward", "backward", "adam", "norm")),
    *(f"flow {way}" for way in ("forward", "inverse", "backward", "adam")),
]
LAYER = ("weight", "bias", "prefix", "panels")


class Call(NamedTuple):
    """A function of tensors by name, and good ones; ``written`` are those that it changes in place."""

    function: Callable[[dict[str, Tensor]], Any]
    tensors: dict[str, Tensor]
    written: tuple[str, ...]


def args_of(flow: Flow) -> FlowArgs:
    """Returns a flow as arguments of the ops, detached."""
    mades = [block.made for block in blocks_of(flow)]
    blocks = [
        kernels.Block(
            [k.weight.detach() for k in m.layers], [k.bias.detach() for k in m.layers], [k.prefix for k in m.layers],
            [k.layout.panels for k in m.layers], m.schedule, "relu", AffineMap(limit=5.0),
        )
        for m in mades
    ]  # fmt: skip
    return flow_args(blocks, permutations_of(flow))


def make_call(name: str, op: Callable[..., Any] | None = None) -> Call:
    """Returns one of ``CALLS``, on tensors of its own; of the op that leads to it if one is given."""
    from fastmaf.kernels.affine_output import native as affine
    from fastmaf.kernels.flow import native as flow
    from fastmaf.kernels.masked_linear import native as linear

    kind, way = name.split()
    model = build(13, blocks=2, order="random", degrees="random", hidden_features=(9, 31), dtype=F32)
    made = blocks_of(model)[0].made
    written = ("weight", "exp_avg", "exp_avg_sq") if way == "adam" else ()
    if kind == "flow":
        return _flow_call(flow, way, args_of(model), written, op)
    layer, rows = (made.output, 13) if kind == "affine" else (made.hidden[0], 9)
    tensors = {
        "weight": layer.weight.detach().clone(), "bias": layer.bias.detach().clone(), "prefix": layer.prefix.clone(),
        "panels": layer.layout.panels.clone(),
    }  # fmt: skip
    if written:
        tensors |= {key: torch.rand(layer.weight.shape) for key in written[1:]}
    inputs = {"x": normal(4, 13, dtype=F32)} | ({"h": normal(4, 31, dtype=F32).relu()} if kind == "affine" else {})
    if kind == "linear":
        inputs |= {} if way == "forward" else {key: normal(4, rows, dtype=F32) for key in ("grad_y", "y")}
    elif way != "forward":
        inputs |= {key: normal(4, 13, dtype=F32) for key in ("grad_z", "grad_log_scale", "z", "log_scale")}
        inputs["grad_ladj"] = normal(4, dtype=F32)

    def function(t: dict[str, Tensor]) -> Any:
        parts = [t[key] for key in LAYER]
        args: Any = LinearArgs(*parts, "relu") if kind == "linear" else AffineArgs(*parts, AffineMap(limit=5.0))
        module: Any = linear if kind == "linear" else affine
        if way == "forward":
            return (op or module.forward)(*[t[key] for key in ("h", "x") if key in t], args)
        batch_type: Any = LinearBatch if kind == "linear" else AffineBatch
        batch = batch_type(**{key: t[key] for key in batch_type._fields})
        if way == "norm":
            return module.squared_norm(batch, args)
        if way == "adam":
            return module.adam_(batch, args, True, Update(t["exp_avg"], t["exp_avg_sq"], NUMBERS))
        return module.backward(batch, args, True, True)

    return Call(function, tensors | inputs, written)


def _flow_call(flow: Any, way: str, args: FlowArgs, written: tuple[str, ...], op: Callable[..., Any] | None) -> Call:
    tensors = {
        f"{name} {i}": t.clone()
        for name, parts in zip((*LAYER, "schedule", "permutation"), args[:6], strict=True)
        for i, t in enumerate(parts)
    }
    x = normal(4, 13, dtype=F32)
    if way in ("forward", "inverse"):
        tensors["x" if way == "forward" else "z"] = x
    else:
        saved = flow.forward(x, args, True)[2]
        tensors |= {"grad_z": x, "grad_ladj": normal(4, dtype=F32), "saved": saved}
    layers = range(len(args.weights))
    if written:
        tensors |= {f"{key} {i}": torch.rand(args.weights[i].shape) for key in written[1:] for i in layers}

    def function(t: dict[str, Tensor]) -> Any:
        parts = [[t[key] for key in t if key.partition(" ")[0] == name] for name in (*LAYER, "schedule", "permutation")]
        found = FlowArgs(*parts, args.activation, args.maps)  # type: ignore[arg-type]
        if op is not None:
            return op(t["x" if way == "forward" else "z"], found)
        if way in ("forward", "inverse"):
            return flow.forward(t["x"], found, True) if way == "forward" else flow.inverse(t["z"], found)
        batch = FlowBatch(t["grad_z"], t["grad_ladj"], t["saved"])
        if way == "backward":
            return flow.backward(batch, found, True)
        return flow.adam_(
            batch, found, True, [Update(t[f"exp_avg {i}"], t[f"exp_avg_sq {i}"], NUMBERS) for i in layers], None
        )

    return Call(function, tensors, tuple(f"{key} {i}" for key in written for i in layers))
