"""What an optimiser takes beside the parameters and their gradients, as part of ``fastmaf.memory_estimate``."""

from __future__ import annotations

import inspect
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastmaf.training.fused_adam import FusedAdam

Optimiser: TypeAlias = torch.optim.Optimizer | type[torch.optim.Optimizer]


def state_per_number(optimiser: Optimiser) -> float:
    """Returns the numbers of state per trained number, found by a step of such an optimiser on a small stand-in.

    Raises:
        TypeError: that step fails.
    """
    kind, settings = _kind(optimiser)
    stand_in = nn.Parameter(torch.zeros(64, device="cpu"))
    stand_in.grad = torch.zeros_like(stand_in)
    try:
        accepted = inspect.signature(kind).parameters.keys() - {"lr", "fused", "foreach", "capturable"}
        make: Any = kind
        twin = make([stand_in], lr=1e-3, **{k: v for k, v in settings.items() if k in accepted})
        twin.step()
    except Exception as error:
        raise TypeError(
            f"the memory of {kind.__name__} cannot be found out: a step on a small stand-in failed: {error}"
        ) from error
    state = [value for value in twin.state[stand_in].values() if isinstance(value, Tensor) and value.dim()]
    return sum(value.numel() for value in state) / stand_in.numel()


def forms_no_gradients(optimiser: Optimiser) -> bool:
    """Says whether ``minimize`` of this optimiser updates packed weights without storing their gradients."""
    kind, settings = _kind(optimiser)
    return issubclass(kind, FusedAdam) and not (settings.get("amsgrad") or settings.get("differentiable"))


def _kind(optimiser: Optimiser) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    return (optimiser, {}) if isinstance(optimiser, type) else (type(optimiser), optimiser.defaults)


def step_bytes(optimiser: Optimiser, sizes: list[int], device: torch.device) -> int:
    """Returns the transient bytes of a step on parameters of these ``sizes`` in bytes.

    Adam holds two copies of one of them, others one; where torch takes all together (``foreach``), one copy of all.
    """
    kind, settings = _kind(optimiser)
    if issubclass(kind, (FusedAdam, torch.optim.SGD)) or settings.get("fused") or not sizes:
        return 0
    together = settings.get("foreach")
    if together or (together is None and device.type == "cuda"):
        return sum(sizes)
    return (2 if issubclass(kind, (torch.optim.Adam, torch.optim.AdamW)) else 1) * max(sizes)
