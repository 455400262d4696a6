"""The memory of an optimiser other than parameters and gradients, as part of ``fastmaf.memory_estimate``."""

from __future__ import annotations

import inspect
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastmaf.training.fused_adam import FusedAdam

Optimizer: TypeAlias = torch.optim.Optimizer | type[torch.optim.Optimizer]


def state_per_number(optimizer: Optimizer) -> float:
    """Returns the numbers of state per trained number, measured in a step of such an optimiser on a small parameter.

    Raises:
        TypeError: that step fails.
    """
    kind, settings = _kind(optimizer)
    parameter = nn.Parameter(torch.zeros(64, device="cpu"))
    parameter.grad = torch.zeros_like(parameter)
    try:
        accepted = inspect.signature(kind).parameters.keys() - {"lr", "fused", "foreach", "capturable"}
        make: Any = kind
        small = make([parameter], lr=1e-3, **{k: v for k, v in settings.items() if k in accepted})
        small.step()
    except Exception as error:
        raise TypeError(
            f"the memory of {kind.__name__} cannot be determined: its step on a small parameter failed: {error}"
        ) from error
    state = [value for value in small.state[parameter].values() if isinstance(value, Tensor) and value.dim()]
    return sum(value.numel() for value in state) / parameter.numel()


def stores_no_gradients(optimizer: Optimizer) -> bool:
    """Returns whether ``minimize`` of this optimiser updates packed weights without storing their gradients."""
    kind, settings = _kind(optimizer)
    return issubclass(kind, FusedAdam) and not (settings.get("amsgrad") or settings.get("differentiable"))


def step_bytes(optimizer: Optimizer, sizes: list[int], device: torch.device) -> int:
    """Returns the transient bytes of a step on parameters of ``sizes`` bytes each.

    Adam holds two copies of one parameter at a time, other optimisers one; with ``foreach``, one copy of all.
    """
    kind, settings = _kind(optimizer)
    if issubclass(kind, (FusedAdam, torch.optim.SGD)) or settings.get("fused") or not sizes:
        return 0
    foreach = settings.get("foreach")
    if foreach or (foreach is None and device.type == "cuda"):
        return sum(sizes)
    return (2 if issubclass(kind, (torch.optim.Adam, torch.optim.AdamW)) else 1) * max(sizes)


def _kind(optimizer: Optimizer) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if isinstance(optimizer, torch.optim.Optimizer):
        return type(optimizer), optimizer.defaults
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        return optimizer, {}
    raise TypeError(f"optimizer must be a torch optimizer or its class; found {optimizer!r}")
