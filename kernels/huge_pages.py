"""Memory for weights and their gradients on huge pages, where the system has them."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_HUGE = 1 << 21


def empty_on_huge_pages(numel: int, *, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Returns an uninitialised tensor ``[numel]``; a large one on the CPU on huge pages, where the system has them.

    Streaming it then causes fewer page walks (5-15% less time on one machine).
    """
    like = torch.empty(0, device=device, dtype=dtype)
    size = numel * like.element_size()
    # A fake tensor, as under torch.compile, has no memory; a small one would waste more of its last page than it gains.
    if type(like) is not Tensor or like.device.type != "cpu" or size < 4 * _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(numel, device=device, dtype=dtype)
    # Mapped and not allocated, so that it can start at a huge page: within an allocator's memory a part is left out.
    memory = mmap.mmap(-1, -(-size // _HUGE) * _HUGE + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a wish; without it the memory is as good as any
        memory.madvise(mmap.MADV_HUGEPAGE)
    first = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return torch.frombuffer(memory, dtype=like.dtype, count=numel, offset=-first % _HUGE)
