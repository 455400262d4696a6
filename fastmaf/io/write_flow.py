"""Writing of flows: the other half of ``fastmaf.io.checkpoint``, independent of the flow classes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmaf.io.flow_config import FORMAT_VERSION, KEY
from fastmaf.io.flow_tensors import EXTRA
from fastmaf.io.packed_weights import not_finite, streamed_weights
from fastmaf.io.tensor_file import write_tensors
from fastmaf.sharing import shared_parts


def write_flow(
    flow: nn.Module,
    config: Mapping[str, Any],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a flow with its ``config()`` to a safetensors file; see ``fastmaf.Flow.save`` for arguments and errors."""
    if metadata and KEY in metadata:
        raise ValueError(f"metadata key {KEY!r} is reserved for the configuration")
    named = (*flow.named_parameters(), *flow.named_buffers())
    empty = next((name for name, tensor in named if tensor.is_meta), None)
    if empty is not None:
        raise ValueError(f"{empty} is on the device 'meta' and holds no numbers to save; nothing was written to {path}")
    shared = shared_parts(flow)
    entry = {"version": FORMAT_VERSION, **config, **({"shared": shared} if shared else {})}
    tensors = {name: tensor.detach() for name, tensor in flow.state_dict().items()}
    weights = streamed_weights(flow, tensors, path)
    for name in tensors.keys() - weights.keys():
        if tensors[name].is_floating_point() and not bool(torch.isfinite(tensors[name]).all()):
            raise not_finite(name, path)
    further = {f"{EXTRA}{name}": tensor for name, tensor in (extras or {}).items()}
    write_tensors({**tensors, **weights, **further}, path, {**(metadata or {}), KEY: json.dumps(entry)})
