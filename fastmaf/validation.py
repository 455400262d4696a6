"""Checks of the arguments and results of a flow: types, shapes, and values that are not finite."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def as_tensor(name: str, x: Tensor | ArrayLike, like: Tensor) -> Tensor:
    """Returns a tensor as it is, and a NumPy array or nested list of numbers with the dtype and device of ``like``.

    Raises:
        TypeError: ``x`` is none of these.
    """
    if isinstance(x, Tensor):
        return x
    found = type(x).__name__
    try:
        array = np.asarray(x)
        if array.dtype.kind in "biuf":
            dtype = np.float32 if array.dtype == np.float32 else np.float64
            return torch.from_numpy(array.astype(dtype)).to(like)
        if array.ndim:
            found = f"{found} with entries that are not numbers"
    except ValueError:
        found = f"{found} with entries of different lengths"
    except RuntimeError as error:  # of tensors within the list that require gradients
        found = f"{found}: {error}"
    raise TypeError(f"{name} must be a tensor, a NumPy array or a nested list of numbers; found {found}")


def as_sizes(name: str, sizes: int | Sequence[int], least: int = 0) -> tuple[int, ...]:
    """Returns an integer, or a sequence of them, as a tuple.

    Raises:
        TypeError: ``sizes`` is neither.
        ValueError: an entry is smaller than ``least``.
    """
    try:
        result = tuple(map(operator.index, sizes if isinstance(sizes, Iterable) else (sizes,)))
    except TypeError:
        raise TypeError(f"{name} must be an integer or a sequence of integers; found {sizes!r}") from None
    if any(size < least for size in result):
        raise ValueError(f"{name} must have entries of {least} or more; found {sizes!r}")
    return result


def as_integer(name: str, value: int) -> int:
    """Returns an integer of any type (of NumPy, or a tensor of one integer) as an int.

    Raises:
        TypeError: ``value`` is not an integer.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; found {value!r}") from None


def as_integers(name: str, numbers: Tensor | Sequence[int], count: int) -> Tensor:
    """Returns a copy of ``count`` integers as int64 on the CPU.

    Raises:
        ValueError: they are not integers, or of another number.
    """
    numbers = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, device="cpu")
    if numbers.shape != (count,) or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise ValueError(f"{name} must be {count} integers; found shape {tuple(numbers.shape)}, dtype {numbers.dtype}")
    return numbers.detach().to("cpu", torch.int64, copy=True)


def check_context(context: Tensor | None, context_features: int) -> None:
    """Raises ValueError unless a context ``[..., C]`` is of the size that is expected, 0 for none."""
    if context is None:
        if context_features:
            raise ValueError(f"expected a context [..., {context_features}]; found None")
    elif not context_features:
        raise ValueError(f"expected no context, as nothing here depends on one; found a tensor {list(context.shape)}")
    elif context.shape[-1:] != (context_features,):
        raise ValueError(f"context must have shape [..., {context_features}]; found {list(context.shape)}")


def broadcast_batches(name: str, x: Tensor, context: Tensor) -> torch.Size:
    """Returns the batch shape of ``x`` ``[..., D]`` and a context ``[..., C]`` together.

    Raises:
        ValueError: their batch shapes do not broadcast.
    """
    try:
        return torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"the batch shapes of {name} and context must broadcast; found {name} {list(x.shape)} and context "
            f"{list(context.shape)}"
        ) from None


class _Thread(threading.local):
    disabled = False


_thread = _Thread()


def validates(setting: bool | None, x: Tensor) -> bool:
    """Returns whether the values of ``x`` are to be checked, given ``validate_args``.

    None checks on the CPU only, since reading a value of a GPU waits for it. While ``x`` is recorded
    (``torch.compile``, a trace, a CUDA graph) it has no values, and nothing is checked.
    """
    if torch.compiler.is_compiling():
        return False
    if _thread.disabled or not (x.is_cpu if setting is None else setting) or x.is_meta:
        return False
    if x.is_cuda:
        return not torch.cuda.is_current_stream_capturing()
    return not torch.jit.is_tracing()  # type: ignore[attr-defined]


def total(x: Tensor) -> float:
    """Returns the sum of a tensor, which is finite only if every entry is; 0 within a functorch transform, where values
    cannot be read.
    """
    try:
        return float(x.item() if x.numel() == 1 else x.sum().item())
    except RuntimeError:
        return 0.0


def check_finite(name: str, x: Tensor) -> None:
    """Raises ValueError if ``x`` ``[N, D]`` contains NaN or infinities."""
    if math.isfinite(total(x)):
        return
    nan, infinite = x.isnan(), x.isinf()
    bad = nan | infinite
    if not bool(bad.any()):  # only the sum overflowed
        return
    row, column = bad.nonzero()[0].tolist()
    raise ValueError(
        f"{name} must be finite; found {int(nan.sum())} NaN and {int(infinite.sum())} infinite values in "
        f"{int(bad.any(dim=1).sum())} of {len(x)} rows, the first in row {row}, column {column}. With "
        "validate_args = False each such row gives NaN or an infinity, and no other row is affected"
    )


@torch.no_grad()
def explain(flow: nn.Module, x: Tensor, row: int, context: Tensor | None = None, *, inverse: bool) -> str:
    """Returns why a finite row of ``x`` ``[N, D]`` does not stay finite on its way through the flow, or its inverse: a
    parameter that is not finite, or the transform that overflows.
    """
    for name, tensor in (*flow.named_parameters(), *flow.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f"{name} holds values that are not finite"
    x = x.detach()  # whole, as a normalisation in training takes no single row
    if not bool(x[row].isfinite().all()):
        return f"the number that the base ({type(flow.base).__name__}) drew overflows {x.dtype}"
    assert isinstance(flow.transforms, nn.ModuleList)
    steps: list[tuple[int, Any]] = list(enumerate(flow.transforms))
    for i, transform in reversed(steps) if inverse else steps:
        of = () if context is None or not transform.context_features else (context.detach(),)
        x, ladj = transform.inverse(x, *of) if inverse else transform(x, *of)
        if not bool(x[row].isfinite().all() & ladj[row].isfinite()):
            return _of_transform(i, transform, x.dtype, [t for _, t in steps])
    return f"the log-density of the base ({type(flow.base).__name__}) overflows {x.dtype}"


def _of_transform(i: int, transform: Any, dtype: torch.dtype, transforms: Sequence[Any]) -> str:
    """Returns why the numbers of transform ``i``, one of ``transforms``, do not stay finite."""
    name, of = f"transforms[{i}] ({type(transform).__name__}", getattr(transform, "transform", transform)
    spline = getattr(of, "spline", None)
    if spline is not None and not spline.tails:
        return f"{name}) is not defined outside of {spline.low:g} to {spline.high:g}, as its spline has no tails"
    bound = f", log_scale_bound={of.log_scale_bound}" if hasattr(of, "log_scale_bound") else ""
    bounds = [getattr(getattr(t, "transform", t), "log_scale_bound", 0.0) for t in transforms]
    most = "without a bound" if None in bounds else f"here to as much as {sum(bounds):g} nats within their bounds"
    return (
        f"numbers overflow {dtype} in {name}{bound}); log-scales add up over the transforms, {most}. A smaller "
        "log_scale_bound, fewer blocks or float64 keep them in range"
    )


def check_density(flow: nn.Module, name: str, result: Tensor, x: Tensor, context: Tensor | None = None) -> None:
    """Checks log-densities ``[N]``, or their terms ``[N, D]``, of ``x`` ``[N, D]`` given ``context`` ``[N, C]``.

    Raises:
        ValueError: they are not finite because ``x`` is not.
        FloatingPointError: they are NaN although ``x`` is finite.
    """
    if math.isfinite(total(result)):
        return
    check_finite("x", x)
    bad = result.isnan().reshape(len(result), -1).any(dim=1)
    if bool(bad.any()):  # else the sum was not finite because it overflowed, or because of infinities
        row = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"{name} is NaN in {int(bad.sum())} of {len(bad)} rows, the first of them row {row}, though x is finite: "
            f"{explain(flow, x, row, context, inverse=False)}"
        )


def check_samples(flow: nn.Module, z: Tensor, *results: Tensor, context: Tensor | None = None) -> None:
    """Raises FloatingPointError if results ``[N, ...]``, computed from noise ``z`` ``[N, D]``, are not finite."""
    if all(math.isfinite(total(result)) for result in results):
        return
    bad = torch.stack([~result.isfinite().reshape(len(z), -1).all(dim=1) for result in results]).any(dim=0)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"{int(bad.sum())} of {len(bad)} samples are not finite, the first of them row {row}: "
            f"{explain(flow, z, row, context, inverse=True)}"
        )


@contextmanager
def not_validating() -> Iterator[None]:
    """Disables value checks in this thread within the block, for callers that check results themselves."""
    previous, _thread.disabled = _thread.disabled, True
    try:
        yield
    finally:
        _thread.disabled = previous
