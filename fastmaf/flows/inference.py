"""Frozen copies of flows, with weights stored in fewer bits."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from fastmaf.flows.composition import Composition
from fastmaf.kernels.float8 import FLOAT8

F = TypeVar("F", bound=Composition)


def inference_copy(flow: F, dtype: torch.dtype) -> F:
    """Implements ``Flow.to_inference``."""
    dtype_of_flow = flow._like().dtype
    rounds = dtype in (torch.bfloat16, FLOAT8)
    if not (dtype_of_flow == torch.float32 if rounds else dtype == dtype_of_flow):
        raise ValueError(
            f"weights for inference are stored as torch.bfloat16 or {FLOAT8} beside float32, or in the flow's "
            f"dtype {dtype_of_flow}; found {dtype}"
        )
    # Given to deepcopy as its memo, so that the weights are not copied in full first.
    rounded: dict[int, Any] = {}
    scale_of: dict[int, float] = {}
    layers = flow._layers()
    for layer in layers:
        if id(layer.weight) not in rounded:
            weight, scale = layer.stored_as(dtype)
            rounded[id(layer.weight)] = nn.Parameter(weight, requires_grad=False)
            scale_of[id(layer.weight)] = scale
    result = copy.deepcopy(flow, rounded)
    for layer, original in zip(result._layers(), layers, strict=True):
        layer.weight_scale = scale_of[id(original.weight)]
    return result.requires_grad_(False).eval()
