"""Batches ``[..., D]`` as rows ``[N, D]``, of which the transforms are functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from fastmaf.validation import broadcast_batches

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def are_rows(x: Tensor | ArrayLike, context: Tensor | ArrayLike | None) -> TypeGuard[Tensor]:
    """Returns whether ``x`` is ``[N, D]``, and ``context`` ``[N, C]`` or none."""
    if not isinstance(x, Tensor) or x.dim() != 2:
        return False
    return context is None or (isinstance(context, Tensor) and context.dim() == 2 and len(context) == len(x))


def by_rows(
    function: Callable[[Tensor, Tensor | None], Any], name: str, x: Tensor, context: Tensor | None
) -> Tensor | tuple[Tensor, ...]:
    """Calls a function of ``[N, D]`` and ``[N, C]`` with rows, and restores the batch shape in its results.

    Args:
        function: of x and the context; returns a tensor or a tuple of these.
        name: of ``x``, for messages.
        x: ``[..., D]``.
        context: ``[..., C]``, of a batch shape that broadcasts with that of ``x``, or None.
    """
    batch = x.shape[:-1]
    if context is not None:
        batch = broadcast_batches(name, x, context)
        x, context = x.expand(*batch, x.shape[-1]), rows_of(context, batch)
    results = function(x.reshape(-1, x.shape[-1]), context)
    if isinstance(results, Tensor):
        return results.reshape(batch + results.shape[1:])
    return tuple(result.reshape(batch + result.shape[1:]) for result in results)


def rows_of(context: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Returns a context ``[..., C]``, expanded to a batch shape, as rows ``[N, C]``."""
    return context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])


def tensor_like(module: nn.Module) -> Tensor:
    """Returns a tensor of the dtype and device of a module's arithmetic: not a weight stored in fewer bits, if any
    other number is there.
    """
    first = None
    for tensor in itertools.chain(_parameters(module), module.buffers()):
        if not tensor.is_floating_point():
            continue
        if tensor.dtype != torch.bfloat16:
            return tensor
        first = tensor if first is None else first
    return torch.empty(0) if first is None else first


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """Yields the parameters of a module, shared ones repeatedly; far faster to its first item than ``parameters()``."""
    modules = [module]
    while modules:
        one = modules.pop()
        for parameter in one._parameters.values():
            if parameter is not None:
                yield parameter
        modules += [child for child in reversed(one._modules.values()) if child is not None]
