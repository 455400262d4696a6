"""Detects modules that must be called, because hooks are registered on them or their ``forward`` was replaced.

A flow's blocks run as one op, which reads parameters and calls no module. Hooks, parametrisations, pruning and replaced
modules have an effect only where modules are called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module


def any_global() -> bool:
    """Returns whether hooks are registered for all modules."""
    return any_global_forward() or bool(torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks)


def any_global_forward() -> bool:
    """Returns whether hooks that may change results are registered for all modules."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def is_called(module: nn.Module) -> bool:
    """Returns whether the module has hooks or a ``forward`` set on the instance, which only a call runs."""
    return any(of(module)) or "forward" in module.__dict__


def of(module: nn.Module) -> list[dict[Any, Any]]:
    """Returns a module's dictionaries of hooks."""
    attributes = module.__dict__  # nn.Module.__getattr__ is slow, and a flow checks every module on every call
    return [
        attributes["_forward_hooks"],
        attributes["_forward_pre_hooks"],
        attributes["_backward_hooks"],
        attributes["_backward_pre_hooks"],
    ]


def computing_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Returns the hooks that compute parameters before each call: those of pruning (including subclasses of torch's
    classes) and of the older ``weight_norm`` and ``spectral_norm``.
    """
    return [
        hook
        for hook in module._forward_pre_hooks.values()
        if any(base.__module__.startswith("torch.nn.utils.") for base in type(hook).__mro__)
    ]


@torch.no_grad()
def compute_parameters(module: nn.Module) -> None:
    """Runs the hooks of ``computing_hooks``: an optimiser changes their inputs, but not the computed parameters."""
    for hook in computing_hooks(module):
        hook(module, ())
