"""torch's factory settings for a while, whatever the process has set."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_inside = 0
_before: tuple[torch.dtype, str | None] = (torch.float32, None)


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Runs a block, or a decorated function, with torch's factory settings, and restores the caller's.

    The default dtype is float32, the default device the CPU; gradients are recorded; there is no inference mode and no
    autocast; float32 matrix products are computed in float32. So a workflow with a dtype and a device of its own gives
    the same results in every process, and ordinary tensors.

    The default dtype and the precision of matrix products belong to the process, the rest to the thread. Those two are
    changed only where they differ from the factory's, and restored when the last thread has left.

    Example:
        >>> torch.set_default_dtype(torch.float64)
        >>> with fastmaf.torch_defaults():
        ...     torch.zeros(1).dtype
        torch.float32
    """
    with ExitStack() as stack:
        stack.enter_context(_process_wide())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # A device as a context makes every call of torch dearer: only where it is needed.
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def _process_wide() -> Iterator[None]:
    global _inside, _before
    with _lock:
        if not _inside:
            _before = torch.get_default_dtype(), _matmul_precision()
            _set(torch.float32, "highest")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _set(*_before)


def _matmul_precision() -> str | None:
    """Returns the precision of float32 matrix products; None where it was set backend by backend, and is left alone."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _set(dtype: torch.dtype, precision: str | None) -> None:
    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)
    if precision is not None and _matmul_precision() not in (None, precision):
        torch.set_float32_matmul_precision(precision)
