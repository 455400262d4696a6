"""Adam on any tensor by a Triton kernel that reads its scalars on the device, for CUDA graphs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmaf.kernels.adam import triton_step
from fastmaf.kernels.triton_common import device as common


@triton.jit
def _adam_kernel(w_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, numel, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < numel
    w = tl.load(w_ptr + i, mask=ok, other=0.0)
    m = tl.load(exp_avg_ptr + i, mask=ok, other=0.0)
    v = tl.load(exp_avg_sq_ptr + i, mask=ok, other=0.0)
    g = tl.load(grad_ptr + i, mask=ok, other=0.0)
    factor, l2, decay, rest1, beta2, rest2, step_size, per_root, eps = triton_step.scalars(scalars_ptr)
    w, m, v = triton_step.step(w, m, v, g, factor, l2, decay, rest1, beta2, rest2, step_size, per_root, eps)
    tl.store(w_ptr + i, w, mask=ok)
    tl.store(exp_avg_ptr + i, m, mask=ok)
    tl.store(exp_avg_sq_ptr + i, v, mask=ok)


def adam_dense_(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor) -> None:
    """Updates a contiguous ``weight`` and its moments in place; ``scalars`` are ``AdamNumbers.kernel_scalars``."""
    numel = weight.numel()
    common.launch(
        _adam_kernel,
        common.cdiv(numel, common.BLOCK),
        weight,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        scalars,
        numel,
        BLOCK=common.BLOCK,
        num_warps=8,  # one load of 16 bytes a thread and tensor
    )


def compile_for(device: torch.device) -> None:
    """Compiles and loads all that ``adam_dense_`` may launch: neither can be done while a CUDA graph is captured."""
    scalars = torch.zeros(16, device=device)
    for numel in (1, 2, 16):  # Triton compiles anew for 1, and for multiples of 16
        weight, grad, exp_avg, exp_avg_sq = (torch.zeros(numel, device=device) for _ in range(4))
        adam_dense_(weight, grad, exp_avg, exp_avg_sq, scalars)
