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
from fastmaf.io.tensor_file import write_tensors
from fastmaf.nn import MaskedLinear
from fastmaf.sharing import names_below, shared_parts


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
    shared = shared_parts(flow)
    # Tiles depend on constants that are tuned from time to time, so each file states its own.
    modules = flow.named_modules(remove_duplicate=False)
    tiles = {name: module.layout.tiles for name, module in modules if isinstance(module, MaskedLinear)}
    entry = {"version": FORMAT_VERSION, **config, "tiles": tiles, **({"shared": shared} if shared else {})}
    named = {**flow.state_dict(), **{f"{EXTRA}{name}": tensor for name, tensor in (extras or {}).items()}}
    tensors = {name: tensor.detach().contiguous() for name, tensor in named.items()}
    # safetensors refuses tensors that share memory: extras and shared parts are copied.
    copied = {*names_below(tensors, shared), *(name for name in tensors if name.startswith(EXTRA))}
    tensors |= {name: tensors[name].clone() for name in copied}
    for name, tensor in tensors.items():
        if not name.startswith(EXTRA) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name} holds numbers that are not finite, which load would refuse; nothing was written to {path}"
            )
    write_tensors(tensors, path, {**(metadata or {}), KEY: json.dumps(entry)})
