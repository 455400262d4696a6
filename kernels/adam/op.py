"""One step of Adam on one tensor, by torch or, with scalars on the device, by Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam

from fastmaf.kernels.adam.update import Update


@torch.no_grad()
def adam_step_(weight: Tensor, grad: Tensor, update: Update) -> None:
    """Updates ``weight`` and its moments in place, as ``torch.optim.Adam`` does; ``grad`` is scaled already.

    Scalars that are to be read on the device are read by the Triton kernel; torch would take them from the host.
    """
    if update.scalars is not None:
        from fastmaf.kernels.adam.triton import adam_dense_

        adam_dense_(weight, grad, update.exp_avg, update.exp_avg_sq, update.scalars)
        return
    numbers = update.numbers
    adam(
        [weight],
        [grad],
        [update.exp_avg],
        [update.exp_avg_sq],
        [],
        [torch.tensor(float(numbers.step - 1), device=weight.device)],
        foreach=False,
        fused=weight.device.type in ("cpu", "cuda"),
        amsgrad=False,
        beta1=numbers.beta1,
        beta2=numbers.beta2,
        lr=numbers.lr,
        weight_decay=numbers.weight_decay,
        eps=numbers.eps,
        maximize=numbers.maximize,
        decoupled_weight_decay=numbers.decoupled,
    )


def compile_adam(device: torch.device) -> None:
    """Compiles the kernel that ``adam_step_`` launches for scalars that are read on the device."""
    from fastmaf.kernels.adam.triton import compile_for

    compile_for(device)
