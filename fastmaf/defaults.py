"""Temporary settings of torch: its factory settings, and those that reproduce results to the bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_before: tuple[torch.dtype, str | None] = (torch.float32, None)


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Runs a block or a decorated function with torch's factory settings, and restores the caller's afterwards.

    The default dtype is float32 and the default device the CPU; gradients are recorded, without inference mode and
    autocast; float32 matrix products are computed in float32. A workflow thus gives the same results in every process.

    The default dtype and the precision of matrix products belong to the process, the other settings to the thread. The
    former are changed only if they differ from the factory settings, and restored when the last thread leaves.

    Example:
        >>> with torch.inference_mode(), fastmaf.torch_defaults():
        ...     torch.zeros(1, requires_grad=True).requires_grad
        True
    """
    with ExitStack() as stack:
        stack.enter_context(_process_wide())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # A device context slows every call of torch down, so it is entered only if needed.
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def deterministic() -> Iterator[None]:
    """Runs a block or a decorated function such that it gives the same bits again, whatever the number of threads.

    Sums depend on how many threads share them, so one thread of torch and of fastmaf computes. Torch takes
    deterministic algorithms, and warns where an operation has none. The caller's settings are restored afterwards. They
    belong to the process: other threads must not compute meanwhile. Equal bits are promised on one machine, with the
    same versions, on the CPU. Fits of inspection models use NumPy and SciPy as well: limit their threads by
    ``threadpoolctl.threadpool_limits(1)``, as the option ``--deterministic`` does.

    Example:
        >>> flow = fastmaf.MAF(features=3, blocks=1, hidden_features=16, seed=0)
        >>> with fastmaf.deterministic():
        ...     a = flow.sample(4, seed=0)
        >>> with fastmaf.deterministic():
        ...     torch.equal(flow.sample(4, seed=0), a)
        True
    """
    threads = torch.get_num_threads()
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        stack.callback(torch.use_deterministic_algorithms, algorithms[0], warn_only=algorithms[1])
        stack.callback(setattr, settings, "fill_uninitialized_memory", filled)
        torch.set_num_threads(1)
        settings.fill_uninitialized_memory = False  # nothing here reads it
        torch.use_deterministic_algorithms(True, warn_only=True)
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
    """Returns the precision of float32 matrix products; None if it was set for each backend."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _set(dtype: torch.dtype, precision: str | None) -> None:
    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)
    if precision is not None and _matmul_precision() not in (None, precision):
        torch.set_float32_matmul_precision(precision)
