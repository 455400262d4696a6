"""The moments and scalars of a step of Adam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class AdamNumbers(NamedTuple):
    """The scalars of one step of Adam (Kingma and Ba 2015, algorithm 1), or AdamW when ``decoupled``.

    Attributes:
        step: the number of this step, from 1.
        lr, beta1, beta2, eps, weight_decay, decoupled, maximize: as ``torch.optim.Adam`` names them.
    """

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool

    @classmethod
    def of(cls, step: int, group: Mapping[str, Any]) -> AdamNumbers:
        """Returns those of a parameter in a group of ``torch.optim.Adam``."""
        beta1, beta2 = group["betas"]
        return cls(
            step=step,
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=bool(group.get("decoupled_weight_decay", False)),
            maximize=bool(group["maximize"]),
        )

    @property
    def step_size(self) -> float:
        """The step size, lr / (1 - beta1^step)."""
        return self.lr / (1 - self.beta1**self.step)

    @property
    def correction2_sqrt(self) -> float:
        """sqrt(1 - beta2^step)."""
        return math.sqrt(1 - self.beta2**self.step)

    def native_floats(self) -> list[float]:
        """Returns the scalars in the order in which the native library takes them."""
        rates = [self.step_size, self.beta1, self.beta2, self.eps, self.correction2_sqrt, self.weight_decay, self.lr]
        return [*rates, float(self.decoupled), float(self.maximize)]

    def kernel_scalars(self, scale: float = 1.0) -> list[float]:
        """Returns the scalars that ``adam.triton_step`` reads, for ``scale`` times the gradient.

        Filled up to 64 bytes, so that rows of them all start at a multiple of 16: a kernel is compiled for the
        alignment of its pointers, and must not have to be while a CUDA graph is captured.
        """
        factor = -scale if self.maximize else scale
        l2 = 0.0 if self.decoupled else self.weight_decay
        decay = 1 - self.lr * self.weight_decay if self.decoupled else 1.0
        rates = [1 - self.beta1, self.beta2, 1 - self.beta2, self.step_size, self.correction2_sqrt, self.eps]
        return [factor, l2, decay, *rates, *[0.0] * 7]


class Update(NamedTuple):
    """The moments of one weight, packed like it, and the scalars of one step of Adam.

    Attributes:
        exp_avg, exp_avg_sq: the moments.
        numbers: the scalars of this step.
        scalars: the same where a GPU reads them when a CUDA graph is replayed, at a later step: float32
            ``[len(numbers.kernel_scalars())]``; None outside of graphs.
        scale: of the gradient; ``scalars`` have their own.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    numbers: AdamNumbers
    scalars: Tensor | None = None
    scale: float = 1.0
