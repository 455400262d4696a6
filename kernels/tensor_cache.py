"""Values that follow from a tensor, kept on it: the one cache of the kernels.

The rule: the owner is a tensor that is never written to (the panels of a layout, a schedule). A value depends only on
the owner, on its key, and on the tensors in ``also``; it is made anew where these are other tensors than before, and
lives as long as the owner.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")
_NAME = "fastmaf_cache"


class TensorCache(dict[Any, tuple[list["weakref.ref[Tensor]"], Any]]):
    """The values of one tensor by key; a copy of the tensor, or one from another process, begins without any."""

    def __deepcopy__(self, memo: object) -> TensorCache:
        return TensorCache()

    def __reduce__(self) -> tuple[type[TensorCache], tuple[()]]:
        return TensorCache, ()


def cached(owner: Tensor, key: object, make: Callable[[], T], also: Sequence[Tensor] = ()) -> T:
    """Returns the value of ``key``, made by ``make`` where it is not there or was made for other tensors."""
    cache: TensorCache | None = getattr(owner, _NAME, None)
    if cache is None:
        cache = TensorCache()
        setattr(owner, _NAME, cache)
    known = cache.get(key)
    if known is None or not all([ref() is tensor for ref, tensor in zip(known[0], also, strict=True)]):
        # Later calls may record gradients, and outlive the torch.func transforms and the export that are active now.
        with torch.inference_mode(False), temporarily_clear_interpreter_stack(), _disable_current_modes():
            known = [weakref.ref(tensor) for tensor in also], make()
        cache[key] = known
    return known[1]


def is_cached(owner: Tensor, key: object) -> bool:
    """Returns whether there is a value of ``key``."""
    return key in getattr(owner, _NAME, ())
