"""Checks for values that are not finite, in the arguments and the results of a flow."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastmaf.flows import Flow


class _Thread(threading.local):
    disabled = False


_thread = _Thread()


def validates(wanted: bool | None, x: Tensor) -> bool:
    """Returns whether values are to be checked.

    Args:
        wanted: True, False, or None for the default: on the CPU only, since on a GPU reading a value waits for the
            device.
        x: the tensor in question. Not while something records what is done with it (``torch.compile``, a trace, a CUDA
            graph), since it has no values then.
    """
    if torch.compiler.is_compiling():
        return False
    if _thread.disabled or not (x.device.type == "cpu" if wanted is None else wanted) or x.is_meta:
        return False
    if x.device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return not torch.jit.is_tracing()  # type: ignore[attr-defined]


def total(x: Tensor) -> float:
    """Returns the sum of a tensor, which is finite only if each number is; 0 where it has no values to look at, as
    within a functorch transform.
    """
    try:
        return float(x.item() if x.numel() == 1 else x.sum().item())
    except RuntimeError:
        return 0.0


def check_finite(name: str, x: Tensor) -> None:
    """Raises ValueError if ``x`` ``[N, D]`` holds NaN or infinity."""
    if math.isfinite(total(x)):
        return
    nan, infinite = x.isnan(), x.isinf()
    bad = nan | infinite
    if not bool(bad.any()):  # only their sum overflowed
        return
    row, column = bad.nonzero()[0].tolist()
    raise ValueError(
        f"{name} must be finite; found {int(nan.sum())} NaN and {int(infinite.sum())} infinite values in "
        f"{int(bad.any(dim=1).sum())} of {len(x)} rows, the first in row {row}, column {column}. With "
        "validate_args = False each such row gives NaN or an infinity, and no other row is touched"
    )


@torch.no_grad()
def explain(flow: Flow, x: Tensor, row: int, *, inverse: bool) -> str:
    """Returns why a finite row of ``x`` does not stay finite: the parameter that is not, or the transform that it
    overflows in.

    Args:
        flow: the flow.
        x: ``[N, D]``, of the base where ``inverse``.
        row: the row in question.
        inverse: whether it went through the inverse.
    """
    for name, tensor in (*flow.named_parameters(), *flow.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f"{name} holds values that are not finite"
    x = x[row : row + 1].detach()
    steps = list(enumerate(flow._transforms()))
    for i, transform in reversed(steps) if inverse else steps:
        x, ladj = transform.inverse(x) if inverse else transform(x)
        if not bool(x.isfinite().all() & ladj.isfinite().all()):
            bounds = [b for _, t in steps if (b := getattr(t, "log_scale_bound", None)) is not None]
            own = getattr(transform, "log_scale_bound", None)
            bound = f", log_scale_bound={own}" if hasattr(transform, "log_scale_bound") else ""
            return (
                f"numbers overflow {x.dtype} in transforms[{i}] ({type(transform).__name__}{bound}); log-scales add "
                f"up over the transforms, here to as much as {sum(bounds):g} nats within their bounds. A smaller "
                "log_scale_bound, fewer blocks or float64 keep them in range"
            )
    return f"½z² overflows {x.dtype}"


def check_density(flow: Flow, name: str, result: Tensor, x: Tensor) -> None:
    """Raises ValueError if a density ``[N]`` or its terms ``[N, D]`` are not finite because ``x`` is not, and
    FloatingPointError if they are NaN although it is.
    """
    if math.isfinite(total(result)):  # a non-finite value anywhere makes the sum non-finite
        return
    check_finite("x", x)
    bad = result.isnan().reshape(len(result), -1).any(dim=1)
    if bool(bad.any()):  # not only the sum of infinities
        row = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"{name} is NaN in {int(bad.sum())} of {len(bad)} rows, the first of them row {row}, though x is finite: "
            f"{explain(flow, x, row, inverse=False)}"
        )


def check_samples(flow: Flow, z: Tensor, *results: Tensor) -> None:
    """Raises FloatingPointError if samples, or their log-densities, that were made from ``z`` are not finite."""
    if all(math.isfinite(total(result)) for result in results):
        return
    bad = torch.stack([~result.isfinite().reshape(len(z), -1).all(dim=1) for result in results]).any(dim=0)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"{int(bad.sum())} of {len(bad)} samples are not finite, the first of them row {row}: "
            f"{explain(flow, z, row, inverse=True)}"
        )


@contextmanager
def not_validating() -> Iterator[None]:
    """Disables value checks in this thread within the block, for callers that check results themselves."""
    previous, _thread.disabled = _thread.disabled, True
    try:
        yield
    finally:
        _thread.disabled = previous
