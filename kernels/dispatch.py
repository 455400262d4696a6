"""Which implementation of an op runs: the only place that chooses.

A backend of an op is the module or folder of its name in the op's folder, with the functions of ``torch``. One that
cannot work here raises ImportError on import and says what to install; one that does not take every tensor of its
devices (a dtype, an old card) also exports ``why_not(like) -> str | None``. Adding a backend to an op means adding its
file, nothing else.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from fastmaf.kernels.triton_common.launch_table import take_cpu_tensors

OPS = ("masked_linear", "affine_output", "flow")

# backend → the device type that it serves; None = any
_BACKENDS = {"triton": "cuda", "native": "cpu", "torch": None}

_chosen: str | None = None


class BackendUnavailableError(RuntimeError):
    """The requested backend is not available; the message gives the reason and a remedy.

    Example:
        >>> try:
        ...     with fastmaf.use_backend("native"):
        ...         available = True
        ... except fastmaf.BackendUnavailableError:
        ...     available = False
    """


class use_backend:
    """Chooses the backend of every op, from now on or for the length of a ``with`` block.

    The choice holds for the whole process: autograd runs backward passes on threads of its own, and they must follow
    it too.

    Args:
        name: ``"torch"``, ``"native"``, ``"triton"``, or None for the default: the fastest one present for the
            tensor's device.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: it is not present in this installation.

    Example:
        >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
        >>> with fastmaf.use_backend("torch"):
        ...     flow.log_prob(torch.randn(5, 3)).shape
        torch.Size([5])
    """

    def __init__(self, name: str | None) -> None:
        global _chosen
        if name is not None:
            if name not in _BACKENDS:
                hint = " (the backend 'reference' is called 'torch' now)" if name == "reference" else ""
                raise ValueError(
                    f"unknown backend {name!r}; expected one of {', '.join(map(repr, _BACKENDS))}, or None for the "
                    f"default{hint}"
                )
            for op in OPS:
                _load(op, name)
        self._before = _chosen
        _chosen = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_: object) -> None:
        global _chosen
        _chosen = self._before


@functools.cache
def _load(op: str, backend: str) -> ModuleType:
    module = f"{__package__}.{op}.{backend}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            reason = f"this version of fastmaf has no {backend!r} backend for {op}; backend 'torch' runs everywhere"
        else:
            reason = f"backend {backend!r} of {op} needs {error.name!r}, which is not installed"
        if error.name == "triton":
            reason += " (for NVIDIA GPUs: pip install 'fastmaf[triton]'; for Pascal see fastmaf doctor)"
        raise BackendUnavailableError(reason) from error
    except ImportError as error:
        raise BackendUnavailableError(f"backend {backend!r} of {op} is not usable here: {error}") from error


def implementation(op: str, like: Tensor) -> ModuleType:
    """Returns the module whose ``forward`` and ``backward`` serve ``op`` on tensors of the device and dtype of
    ``like``.

    Raises:
        BackendUnavailableError: the backend chosen by ``use_backend`` is missing or does not serve such tensors. Only
            the default choice falls back.
    """
    if _chosen is None:
        return _default(op, like.device, like.dtype)
    reason = why_not(op, _chosen, like)
    if reason is not None:
        raise BackendUnavailableError(reason)
    return _load(op, _chosen)


@functools.cache
def _default(op: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    return _load(op, default_backend(op, torch.empty(0, device=device, dtype=dtype)))


def default_backend(op: str, like: Tensor) -> str:
    """Returns the name of the fastest backend present for ``op`` on tensors like this one."""
    served = [name for name, device in _BACKENDS.items() if device in (None, like.device.type)]
    return next(name for name in served if why_not(op, name, like) is None)


def why_not(op: str, backend: str, like: Tensor) -> str | None:
    """Returns why ``backend`` cannot serve ``op`` on tensors like this one, or None when it can."""
    device = _BACKENDS[backend]
    # The Triton kernels may also accept tensors on the CPU: on request, never by default.
    on_cpu = backend == "triton" and like.device.type == "cpu" and take_cpu_tensors()
    if device not in (None, like.device.type) and not on_cpu:
        return f"backend {backend!r} runs on {device} tensors; {op} was given one on {like.device}"
    reason = missing(op, backend)
    if reason is None and hasattr(module := _load(op, backend), "why_not"):
        reason = module.why_not(like)
    return reason


@functools.cache
def missing(op: str, backend: str) -> str | None:
    """Returns why this installation has no ``backend`` for ``op``, or None when it has."""
    try:
        _load(op, backend)
    except BackendUnavailableError as error:
        return str(error)
    return None


def names() -> tuple[str, ...]:
    """Returns the names of all backends, fastest first."""
    return tuple(_BACKENDS)


def chosen() -> str | None:
    """Returns the backend set by ``use_backend``, or None for the default choice."""
    return _chosen
