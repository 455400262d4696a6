"""One step of Adam on one tensor, on the backend that can take it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaf.kernels.adam import torch as by_torch
from fastmaf.kernels.adam.update import Update


@torch.no_grad()
def adam_step_(weight: Tensor, grad: Tensor, update: Update) -> None:
    """Updates ``weight`` and its moments in place, as ``torch.optim.Adam`` does.

    Scalars that are to be read on the device are read by the Triton kernel; torch would take them from the host.
    """
    if update.scalars is None:
        by_torch.adam_step_(weight, grad, update)
    else:
        from fastmaf.kernels.adam.triton import adam_dense_

        adam_dense_(weight, grad, update.exp_avg, update.exp_avg_sq, update.scalars)


def compile_adam(device: torch.device) -> None:
    """Compiles the kernel that ``adam_step_`` launches for scalars that are read on the device."""
    from fastmaf.kernels.adam.triton import compile_for

    compile_for(device)
