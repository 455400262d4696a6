"""Detects modules that must be called, because hooks are registered on them or their ``forward`` was replaced.

A flow's blocks run as one op, which reads parameters and calls no module. Hooks, parametrisations, pruning and replaced
modules have an effect only where modules are called.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def any_global() -> bool:
    """Returns whether hooks are registered for all modules."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_called(module: nn.Module) -> bool:
    """Returns whether the module has hooks or a ``forward`` set on the instance, which only a call runs."""
    own = module.__dict__  # past nn.Module's own look-ups: a flow checks every module at every call
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    return "forward" in own
