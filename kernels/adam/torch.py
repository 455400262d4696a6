"""One step of Adam on one tensor, by torch: the truth that the fused steps are held against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam

from fastmaf.kernels.adam.update import Update


def adam_step_(weight: Tensor, grad: Tensor, update: Update) -> None:
    """Updates ``weight`` and its moments in place, as ``torch.optim.Adam`` does."""
    numbers = update.numbers
    fused = weight.device.type in ("cpu", "cuda")
    adam(
        [weight],
        [grad],
        [update.exp_avg],
        [update.exp_avg_sq],
        [],
        [torch.tensor(float(numbers.step - 1), device=weight.device)],
        foreach=False,
        fused=fused,
        amsgrad=False,
        beta1=numbers.beta1,
        beta2=numbers.beta2,
        lr=numbers.lr,
        weight_decay=numbers.weight_decay,
        eps=numbers.eps,
        maximize=numbers.maximize,
        decoupled_weight_decay=numbers.decoupled,
    )
