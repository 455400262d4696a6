"""The gradient of a packed weight as what it is made of, for optimisers that never store it.

The gradient of a weight is an outer product of small matrices: ``gradᵀ x`` over the batch. An optimiser that forms it
tile by tile and updates the weight at once saves writing and reading as many numbers as the weight has. Such an
optimiser registers as the *taker* of a weight; the backward passes of the ops then hand it these factors and return no
gradient.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastmaf.kernels.backends import implementation


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

    @property
    def step_size(self) -> float:
        """The step size, lr / (1 - beta1^step)."""
        return self.lr / (1 - self.beta1**self.step)

    @property
    def correction2_sqrt(self) -> float:
        """sqrt(1 - beta2^step)."""
        return math.sqrt(1 - self.beta2**self.step)

    def kernel_scalars(self, scale: float = 1.0) -> list[float]:
        """Returns what ``triton_parts.adam`` reads, for ``scale`` times the gradient.

        Filled up to 64 bytes, so that rows of them all start at a multiple of 16: a kernel is compiled for the
        alignment of its pointers, and must not have to be while a CUDA graph is captured.
        """
        numbers = [
            -scale if self.maximize else scale,
            0.0 if self.decoupled else self.weight_decay,
            1 - self.lr * self.weight_decay if self.decoupled else 1.0,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            self.step_size,
            self.correction2_sqrt,
            self.eps,
        ]
        return numbers + [0.0] * (16 - len(numbers))


class Update(NamedTuple):
    """What one step of Adam on one weight needs beside its gradient: its moments, packed like it, and the scalars.

    Attributes:
        exp_avg, exp_avg_sq: the moments.
        numbers: the scalars of this step.
        scalars: the same where a GPU reads them when a CUDA graph is replayed, at a later step: float32
            ``[len(numbers.kernel_scalars())]``; None outside of graphs.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    numbers: AdamNumbers
    scalars: Tensor | None = None


# How many of an op's batch tensors, the first ones, are gradients.
_FROM_ABOVE = {"masked_linear": 1, "affine_output": 3}


class Factors(NamedTuple):
    """What one backward pass of an op makes the gradient of its weight from.

    Attributes:
        op: ``"masked_linear"`` or ``"affine_output"``.
        batch: the op's tensors that have the batch as their first dimension.
        weight, prefix, tiles: packed, and how.
        options: the op's further arguments.
        scale: the gradient is this many times what the tensors give.
    """

    op: str
    batch: tuple[Tensor, ...]
    weight: Tensor
    prefix: Tensor
    tiles: Tensor
    options: tuple[Any, ...]
    scale: float = 1.0

    def _arguments(self) -> tuple[Any, ...]:
        return (*self.batch, self.weight, self.prefix, self.tiles, *self.options)

    def _backend(self) -> Any:
        return implementation(self.op, self.batch[0])

    def grad_inputs(self, need_inputs: bool) -> tuple[Tensor, ...]:
        """Returns the gradients of everything but the weight; empty tensors where the inputs' are not needed."""
        result: tuple[Tensor, ...] = self._backend().grad_inputs(*self._arguments(), need_inputs)
        return result

    def adam_(self, update: Update, *, need_inputs: bool = False) -> tuple[Tensor, ...]:
        """Takes a step of Adam with the gradient, in place; returns what ``grad_inputs`` does.

        Scaled factors are for the step alone: the gradients returned with them mean nothing.
        """
        result: tuple[Tensor, ...] = self._backend().adam_(*self._arguments(), need_inputs, update, self.scale)
        return result

    def scaled(self, factor: float) -> Factors:
        """Returns the factors of ``factor`` times this gradient."""
        return self._replace(scale=self.scale * factor)

    def unscaled(self) -> Factors:
        """Returns factors of the same gradient with scale 1: it is linear in the gradients that came from above."""
        n = _FROM_ABOVE[self.op]
        return self._replace(batch=(*(t * self.scale for t in self.batch[:n]), *self.batch[n:]), scale=1.0)

    def squared_norm(self) -> Tensor | float:
        """Returns the sum of the squares of the gradient; on a GPU a tensor, so that nothing waits for it here."""
        square: Tensor | float = self._backend().squared_norm(*self._arguments())
        return self.scale**2 * square

    def grad_weight(self) -> Tensor:
        """Returns the gradient itself, packed."""
        result: Tensor = self._backend().grad_weight_of(*self._arguments())
        return result.mul_(self.scale)


def joined(factors: Sequence[Factors]) -> Factors:
    """Returns the factors of the sum of several gradients of one weight."""
    if len(factors) == 1:
        return factors[0]
    if len({f.scale for f in factors}) > 1:  # some were clipped before others came
        factors = [f.unscaled() for f in factors]
    return factors[0]._replace(batch=tuple(torch.cat(parts) for parts in zip(*(f.batch for f in factors), strict=True)))


class Taker(Protocol):
    """What takes the gradient of a weight as factors.

    Attributes:
        updates_at_once: the weight is updated as soon as its gradient is known; else the factors are kept.
    """

    @property
    def updates_at_once(self) -> bool: ...

    def begin_update(self) -> Update:
        """Returns what the caller must now update the weight with: where ``updates_at_once``, in place of ``take``."""
        ...

    def take(self, factors: Factors, need_inputs: bool) -> tuple[Tensor, ...]:
        """Keeps or applies the gradient; returns what ``Factors.grad_inputs`` does."""
        ...


# By the identity of the weight; the taker lives as long as its optimiser.
_takers: WeakIdKeyDictionary = WeakIdKeyDictionary()


def give_to(weight: Tensor, taker: Taker) -> None:
    """Makes ``taker`` the taker of the gradient of ``weight``, in place of any other, for as long as it lives."""
    _takers[weight] = weakref.ref(taker)


def taker_of(weight: Tensor) -> Taker | None:
    """Returns the taker of the gradient of ``weight``, if it has one."""
    known: weakref.ref[Taker] | None = _takers.get(weight)
    return None if known is None else known()
