"""The activations of hidden layers. The ops compute ``OP_ACTIVATIONS`` themselves; others are computed between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastmaf.kernels.masked_linear.args import ACTIVATIONS as OP_ACTIVATIONS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
    "leaky_relu": functional.leaky_relu,
    "silu": functional.silu,
}
"""The activations by name, with the constants that are torch's defaults."""

__all__ = ["ACTIVATIONS", "OP_ACTIVATIONS", "activate_"]


def activate_(y: Tensor, activation: str) -> Tensor:
    """Applies an activation in place and returns ``y``."""
    if activation == "identity":
        return y
    return y.relu_() if activation == "relu" else y.copy_(ACTIVATIONS[activation](y))
