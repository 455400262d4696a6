"""Checks of a masked layer's weight in a ``state_dict`` that is to be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels import PackedLayout
from fastmaf.kernels.float8 import BYTE
from fastmaf.tiles import packs_tiles, tiles_to_panels


def checked_weight(packed: Tensor, layout: PackedLayout, shape: torch.Size, version: int | None, name: str) -> Tensor:
    """Returns a weight of a ``state_dict``, packed as in this version.

    Args:
        packed: the weight, which a former version may have packed in tiles.
        layout: of the layer.
        shape: of the layer's own weight; one of another shape is left to torch, which refuses it.
        version: of the layer in the metadata of the ``state_dict``.
        name: of the weight, for messages.

    Raises:
        ValueError: it is no weight of the layer, or holds numbers where the mask hides them.
    """
    if packs_tiles(packed, layout, version):
        packed = tiles_to_panels(packed, layout, name)
    if packed.shape == shape and not layout.padding_is_zero(packed):
        raise ValueError(
            f"{name} holds numbers where the mask hides the weight: it was packed for other degrees, is "
            "damaged, or noise was added to it (reparameterize of zuko's BayesianModel works, sample_model "
            "does not)"
        )
    return packed


def scale_to_load(state_dict: Mapping[str, Any], prefix: str, own_weight: Tensor | None) -> float | None:
    """Returns the ``weight_scale`` that belongs to a float8 weight of a ``state_dict``; None of other weights.

    Raises:
        ValueError: the layer has float8 weights and the ``state_dict`` has not, or the reverse.
    """
    weight, scale = (state_dict.get(f"{prefix}{name}") for name in ("weight", "weight_scale"))
    has_bytes = own_weight is not None and own_weight.dtype == BYTE
    if (weight is not None or scale is not None) and has_bytes != (scale is not None):
        found, own = ("other", "float8") if has_bytes else ("float8", "other")
        raise ValueError(
            f"{prefix}weight: a state_dict with {found} weights cannot be loaded into a layer with {own} ones: "
            "call to_inference() after loading"
        )
    return None if scale is None else float(scale)
