"""A start of a MADE from which it passes linear functions: ReLU units in mirrored pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_MOST_UNITS = 4  # of a mirrored layer, per dimension: with more, kinks at different places are worth more than pairs


@torch.no_grad()
def mirror_(layers: Sequence[Any], features: int) -> None:
    """Turns the freshly drawn weights of a chain of ``MaskedLinear`` into mirrored ones, in place.

    Units 2k and 2k + 1 of a hidden layer get opposite weights and biases, and the layer above weighs them oppositely.
    As relu(a) − relu(−a) = a, the network starts linear where units of a pair have the same degree. Weights of a unit
    are scaled by (in_features / p)^(1/4) for p visible inputs, halfway to a variance that does not depend on the mask;
    those of the output layer by min(1, 2 / √D), so that the untrained log-density differs from that of the base
    distribution by an amount that does not grow with D.

    Layers of more than 4 D units are scaled but not mirrored.

    References:
        Balduzzi, Frean, Leary, Lewis, Ma and McWilliams 2017, The Shattered Gradients Problem: If resnets are the
        answer, then what is the question?, section 4.
    """
    below = 0  # units of the layer below that are paired
    for layer in layers[:-1]:
        pairs = layer.out_features // 2 * 2 if layer.out_features <= _MOST_UNITS * features else 0
        prefix = layer.prefix.clone()
        prefix[1:pairs:2] = prefix[0:pairs:2]
        weight = _visible(_opposite_columns(layer.dense_weight(), below), prefix)
        weight *= (layer.in_features / prefix.clamp(min=1).to(weight.dtype))[:, None] ** 0.25
        weight[1:pairs:2] = -weight[0:pairs:2]
        bias = layer.bias.clone()
        bias[1:pairs:2] = -bias[0:pairs:2]
        layer.load_dense_(weight, bias)
        below = pairs
    output, factor = layers[-1], min(1.0, 2.0 / math.sqrt(features))
    output.load_dense_(factor * _opposite_columns(output.dense_weight(), below), factor * output.bias)


def _opposite_columns(weight: Tensor, paired: int) -> Tensor:
    weight[:, 1:paired:2] = -weight[:, 0:paired:2]
    return weight


def _visible(weight: Tensor, prefix: Tensor) -> Tensor:
    return weight * (torch.arange(weight.shape[1], device=weight.device) < prefix[:, None])
