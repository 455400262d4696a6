"""Kernels that start before those ahead of them have ended, on compute capability 9.0 and newer.

With programmatic dependent launch a kernel's programs take the multiprocessors' free places as soon as all programs of
the kernel before have started; ``wait`` holds them until that one, and so every one before, has ended and its writes
are seen. Memory stands idle while a kernel waits for chains of small steps: until then the next one's programs ask for
their weights, which come as far as the second-level cache.

Every program of a kernel with the argument OVERLAP waits, before it reads what a kernel may have written and before it
writes anything. Before it waits, it may load tables that never change, and prefetch, which has no effect on results.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl


@functools.cache
def supported() -> bool:
    """Returns whether this Triton launches kernels so: 3.4 and newer do."""
    try:
        from triton.backends.nvidia.compiler import CUDAOptions
    except ImportError:
        return False
    return "launch_pdl" in CUDAOptions.__dataclass_fields__


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Lets the next kernel start, and waits until all kernels before have ended."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], tl.int32, False, 1
        )


@triton.jit
def prefetch(ptr, start, count, OVERLAP: tl.constexpr):
    """Asks for ``count`` numbers from number ``start`` on; those that share 16 bytes with others may be left out."""
    if OVERLAP:
        SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
        first = (ptr.to(tl.int64) + start.to(tl.int64) * SIZE) & -16
        size = (count * SIZE).to(tl.int32) & -16
        tl.inline_asm_elementwise(
            """{
            .reg .pred one, some;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 one, thread, 0;
            setp.gt.and.s32 some, $2, 0, one;
            @some cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.b32 $0, 0;
            }""",
            "=r,l,r", [first, size], tl.int32, False, 1,
        )  # fmt: skip


@triton.jit
def prefetch_panels(
    w_ptr, panels_ptr, before, block, rows, k_begin, k_end, PANELS: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Prefetches up to COLUMNS columns k_begin..k_end of a block of panels, before which are ``before`` columns."""
    if OVERLAP:
        start = before.to(tl.int64)
        for q in tl.static_range(PANELS):
            if q:
                panel = block * PANELS + q
                start = tl.load(panels_ptr + panel, mask=panel * 16 < rows, other=0)
                k_end = tl.load(panels_ptr + panel + 1, mask=panel * 16 < rows, other=0) - start
            prefetch(w_ptr, (start + k_begin) * 16, tl.minimum(k_end - k_begin, COLUMNS) * 16, OVERLAP)
