"""Dropout that is left out for a while, in one thread, without a change of modules."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

_thread = threading.local()


@contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Lets dropout run as in evaluation, in this thread: that of any MADE, and where ``network`` has modules of other
    classes in training, torch's functions of dropout.
    """
    before, _thread.is_off = is_off(), True
    try:
        with _NoDropout() if any(map(_may_call_dropout, network.modules())) else nullcontext():
            yield
    finally:
        _thread.is_off = before


def is_off() -> bool:
    """Returns whether dropout is left out in this thread."""
    return getattr(_thread, "is_off", False)


class _NoDropout(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        return function(*args, **kwargs)


_DROPOUTS = {
    getattr(functional, name)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
}


def _may_call_dropout(module: nn.Module) -> bool:
    known = type(module).__module__.startswith(("fastmaf.", "torch."))
    return module.training and (isinstance(module, _DropoutNd) if known else True)
