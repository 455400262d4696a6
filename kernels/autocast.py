"""Arithmetic that does not follow ambient autocast, whose half-precision products would cost a density many digits.

``torch.autocast`` acts where an operation is called, and the formulas of a backward pass are called where that pass
runs. Both directions are therefore taken out of it: ``outside_autocast`` is for functions, ``matmul`` for the one
differentiable operation used here whose derivatives are matrix products, too.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])
_HALF = (torch.bfloat16, torch.float16)


def outside_autocast(function: F) -> F:
    """Decorates a function of tensors, or a module's method, to run without autocast.

    Within an autocast region its bfloat16 and float16 arguments, which a network upstream may have made, are converted
    first: to the module's dtype, or to float32 where it has none. Elsewhere nothing is converted.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()) if kwargs else args:  # no generator: every call of a flow comes this way
            if isinstance(arg, Tensor):
                device = "cpu" if arg.is_cpu else arg.device.type
                break
        else:
            return function(*args, **kwargs)
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        dtype = _dtype_of(args[0])
        with _none(device):
            return function(
                *[_converted(arg, dtype) for arg in args],
                **{name: _converted(arg, dtype) for name, arg in kwargs.items()},
            )

    return wrapped  # type: ignore[return-value]


def _converted(arg: Any, dtype: torch.dtype) -> Any:
    return arg.to(dtype) if isinstance(arg, Tensor) and arg.dtype in _HALF else arg


def _dtype_of(owner: Any) -> torch.dtype:
    """Returns the dtype of a module's arithmetic: weights may be stored in fewer bits than the rest."""
    if not isinstance(owner, nn.Module):
        return torch.float32
    tensors = itertools.chain(owner.parameters(), owner.buffers())
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return next(iter(sorted(dtypes.difference(_HALF) or dtypes, key=str)), torch.float32)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Returns ``a @ b`` of two matrices; no derivative of any order follows autocast, wherever it is computed."""
    if forward_ad._current_level >= 0:
        # A Function's own jvp is not differentiated by an outer level of forward mode. Autocast leaves float64 alone.
        return (a.double() @ b.double()).to(a.dtype)
    recorded = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    # Within a transform a tensor's requires_grad is that of the innermost level alone.
    if recorded or torch._C._are_functorch_transforms_active():
        return _Matmul.apply(a, b)
    return a @ b


class _Matmul(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with _none(a.device.type):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        with _none(a.device.type):
            return matmul(grad, b.mT) if needs_a else None, matmul(a.mT, grad) if needs_b else None


def _none(device: str) -> contextlib.AbstractContextManager[Any]:
    """Returns a region without autocast, entered even where there is none: a compiled one may be run within another."""
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
