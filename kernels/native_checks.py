"""Checks of the tensors whose pointers go to the native library, which trusts them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.tensor_cache import cached

_data_ptr, _numel, _is_contiguous = Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous
_version, _dtype = map(operator.attrgetter, ("_version", "dtype"))


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raises ValueError unless a tensor can be read through its pointer."""
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be on the CPU for the native kernels; found {tensor.device}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}; found {tensor.dtype}")
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; found {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; found strides {tensor.stride()}")


def check_batch(name: str, tensor: Tensor) -> tuple[int, int]:
    """Returns the shape of a tensor ``[N, units]`` of activations, checked."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be [N, units]; found shape {tuple(tensor.shape)}")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64; found {tensor.dtype}")
    check_tensor(name, tensor, tensor.dtype, tensor.shape)
    return tensor.shape[0], tensor.shape[1]


def check_layout(prefix: Tensor, panels: Tensor, columns: int | None = None) -> None:
    """Raises ValueError unless ``prefix`` and ``panels`` are the layout of a layer, with so many columns if given."""
    key = states([prefix, panels])
    known: list[Any] = cached(panels, "layout", lambda: [(None, 0)], also=[prefix])
    seen, widest = known[0]  # read once: other threads may check the same layout
    if seen != key:
        widest = _widest_panel(prefix, panels)
        known[0] = key, widest
    if columns is not None and widest > columns:
        raise _other_layout(prefix, columns)


def _widest_panel(prefix: Tensor, panels: Tensor) -> int:
    rows = prefix.numel()
    check_tensor("prefix", prefix, torch.int64, (rows,))
    check_tensor("panels", panels, torch.int64, (-(-rows // PANEL) + 1,))
    widths, last = panels.diff(), prefix[PANEL - 1 :: PANEL]
    last = torch.cat((last, prefix[-1:])) if rows % PANEL else last
    sound = rows > 0 and int(panels[0]) == 0 and int(prefix[0]) >= 0
    if not sound or bool((prefix.diff() < 0).any()) or bool((widths < last).any()):
        raise _other_layout(prefix)
    return int(widths.max())


def _other_layout(prefix: Tensor, columns: int | None = None) -> ValueError:
    size = f"{prefix.numel()} rows" + ("" if columns is None else f" and {columns} columns")
    return ValueError(
        f"prefix and panels must be the layout of a layer of {size}, as PackedLayout makes them; found others: they "
        "belong to another weight"
    )


def states(constants: Sequence[Tensor]) -> tuple[Any, ...]:
    """Returns what shows a change of tensors that are the same objects as before; equal to nothing where none can."""
    try:
        versions = list(map(_version, constants))
    except RuntimeError:  # inference tensors have none
        versions = [object()]
    memory = list(map(_data_ptr, constants)), list(map(_numel, constants)), list(map(_dtype, constants))
    return versions, *memory, all(map(_is_contiguous, constants))
