"""The network of an autoregressive transform in a model file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaf.kernels import empty_on_huge_pages
from fastmaf.kernels.float8 import BYTE, FLOAT8
from fastmaf.nn import MADE

_OPTIONS = ("residual", "context_features", "dropout")  # of networks, written where they are not the default
_STORED = {str(torch.bfloat16): torch.bfloat16, str(FLOAT8): BYTE}


def network_config(made: MADE) -> dict[str, Any]:
    """Returns what a network adds to the configuration of its transform."""
    output = made.output
    return {
        "features": made.features,
        "hidden_features": list(made.hidden_features),
        "activation": made.activation if isinstance(made.activation, str) else list(made.activation),
        **{name: value for name in _OPTIONS if (value := getattr(made, name))},
        **({} if output.weight_dtype == output.bias.dtype else {"weight_dtype": str(output.weight_dtype)}),
    }


def network_from(config: Mapping[str, Any], tensors: Mapping[str, Tensor], **options: Any) -> MADE:
    """Returns a network of a ``network_config``, to be loaded.

    Args:
        tensors: of the transform.
        options: of ``MADE``.
    """
    hidden = config["hidden_features"]
    made = MADE(
        config["features"],
        hidden,
        degrees=[tensors[f"made.degrees_{k}"] for k in range(len(hidden))],
        activation=config["activation"],
        **{name: config[name] for name in _OPTIONS if name in config},
        init="empty",
        dtype=tensors["made.output.bias"].dtype,
        **options,
    )
    if stored := _STORED.get(config.get("weight_dtype", "")):
        for layer in made.layers:
            weight = empty_on_huge_pages(layer.layout.numel, device=layer.weight.device, dtype=stored)
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return made
