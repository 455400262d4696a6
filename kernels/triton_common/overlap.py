"""Programmatic dependent launch, on compute capability 9.x: a kernel starts before the one ahead of it has ended.

Its programs become resident as soon as all programs of the kernel before have begun and leave room; ``wait`` holds them
until that kernel has ended and its writes are visible. Meanwhile they prefetch their weights into the second-level
cache: memory would stand idle while the other kernel waits for chains of small steps.

Every program of a kernel with the argument OVERLAP waits once, outside of any loop and branch, before it reads what a
kernel may have written and before it writes anything. Before it waits, it may load tables that never change, and
prefetch, which has no effect on results. The next kernel is let go after the wait: when it begins, all kernels but the
last have ended. Within a loop that Triton pipelines it would move loads across the wait; elsewhere it keeps the order,
as the instruction has side effects. ``bench.dev.early`` proves all this of the machine code.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

_DRIVER = 12_030  # the first that records such launches in CUDA graphs


def allowed() -> bool:
    """Returns whether kernels may be launched so: FASTMAF_OVERLAP is not 0, and Triton and the driver can."""
    return os.environ.get("FASTMAF_OVERLAP", "1") != "0" and _supported()


@functools.cache
def _supported() -> bool:
    try:
        from triton.backends.nvidia.compiler import CUDAOptions
    except ImportError:
        return False
    # Without a GPU, or a torch that tells, kernels are compiled as for a new driver.
    version = getattr(torch._C, "_cuda_getDriverVersion", None) if torch.cuda.is_available() else None
    return "launch_pdl" in CUDAOptions.__dataclass_fields__ and (version is None or version() >= _DRIVER)


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Waits until all kernels before have ended, and lets the next one begin."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], tl.int32, False, 1
        )


@triton.jit
def prefetch(ptr, start, count, OVERLAP: tl.constexpr):
    """Prefetches ``count`` numbers from number ``start`` on, if any; at the ends whole 16 bytes alone."""
    if OVERLAP:
        SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
        first = (ptr.to(tl.int64) + start.to(tl.int64) * SIZE) & -16
        size = (tl.maximum(count, 0) * SIZE).to(tl.int32) & -16
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
    """Prefetches up to COLUMNS columns k_begin..k_end of each of a block's panels; a single one has ``before`` columns
    before it.
    """
    if OVERLAP:
        for q in tl.static_range(PANELS):
            start, end = before.to(tl.int64), k_end
            if PANELS > 1:
                panel = block * PANELS + q
                start = tl.load(panels_ptr + panel, mask=panel * 16 < rows, other=0)
                stop = tl.load(panels_ptr + panel + 1, mask=panel * 16 < rows, other=0)
                end = tl.minimum(k_end, (stop - start).to(tl.int32))
            prefetch(w_ptr, (start + k_begin) * 16, tl.minimum(end - k_begin, COLUMNS) * 16, OVERLAP)
