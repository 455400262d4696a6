"""Memory for weights and what is as large, on huge pages where the system has them."""

from __future__ import annotations

import ctypes
import functools
import mmap
import weakref

import torch
from torch import Tensor

_HUGE = 1 << 21


def empty_on_huge_pages(numel: int, *, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Returns an uninitialised tensor ``[numel]``; a large one on the CPU on huge pages, where the system has them.

    Streaming it then causes fewer page walks (5-15% less time on one machine), and fresh memory fewer page faults.
    """
    like = torch.empty(0, device=device, dtype=dtype)
    size = numel * like.element_size()
    # A fake tensor, as under torch.compile, has no memory; a small one would waste more of its last page than it gains.
    if type(like) is not Tensor or like.device.type != "cpu" or size < 4 * _HUGE or (libc := _libc()) is None:
        return torch.empty(numel, device=device, dtype=dtype)
    # It starts and ends with a huge page: within an allocator's memory a part would be left out.
    rounded = -(-size // _HUGE) * _HUGE
    address = libc.aligned_alloc(_HUGE, rounded)
    if not address:
        raise MemoryError(f"no memory for {rounded} bytes")
    libc.madvise(address, rounded, mmap.MADV_HUGEPAGE)  # a wish; without it the memory is as good as any
    memory = (ctypes.c_char * rounded).from_address(address)
    weakref.finalize(memory, libc.free, address).atexit = False  # tensors may outlive the interpreter's last functions
    return torch.frombuffer(memory, dtype=like.dtype, count=numel)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """Returns the C library, or None where it has no huge pages to ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.aligned_alloc.argtypes, libc.aligned_alloc.restype = [ctypes.c_size_t, ctypes.c_size_t], ctypes.c_void_p
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    except (OSError, AttributeError):
        return None
    return libc
