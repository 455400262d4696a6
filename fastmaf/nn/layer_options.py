"""What a MADE gives its layers beside masks: activations, and the weights of a context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastmaf.kernels.activations import ACTIVATIONS
from fastmaf.nn.masked_linear import Init, MaskedLinear


def checked_activation(activation: str | Sequence[str], layers: int, residual: bool) -> str | tuple[str, ...]:
    """Returns the activation of all hidden layers, or those of each, after checks.

    Raises:
        ValueError: one is unknown, or there is not one for each layer.
    """
    if isinstance(activation, str):
        result: str | tuple[str, ...] = activation
    else:
        result = tuple(activation) if isinstance(activation, Sequence) else ()
    names = activations_of_layers(result, layers, residual)
    if len(names) != layers or not all(name in list(ACTIVATIONS) for name in names):
        raise ValueError(
            f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, or one of them for each of "
            f"{layers} hidden layers; found {activation!r}"
        )
    if not residual and len(set(names)) == 1:
        return names[0]  # one for all: ReLUs, listed or not, then run as one op
    return result


def activations_of_layers(activation: str | tuple[str, ...], layers: int, residual: bool) -> list[str]:
    """Returns the activation of each hidden layer: of the last one of residual blocks, unless it is given, the
    identity.
    """
    if not isinstance(activation, str):
        return list(activation)
    return [activation] * (layers - 1) + ["identity" if residual else activation]


def context_layer(layer: MaskedLinear, context_features: int, init: Init, generator: torch.Generator | None) -> Any:
    """Returns the layer by which a context is added to a masked one, initialised as further columns of it."""
    like = layer.bias
    result = nn.utils.skip_init(
        nn.Linear, context_features, layer.out_features, bias=False, device=like.device, dtype=like.dtype
    )
    with torch.no_grad():
        if init == "identity":
            result.weight.zero_()
        elif init == "linear" and not like.is_meta:
            bound = 1 / math.sqrt(layer.in_features + context_features)
            result.weight.uniform_(-bound, bound, generator=generator)
    return result
