"""Packed-weight gradients in factored (outer-product) form, for optimisers that never store them.

The gradient of a weight is an outer product of small matrices: ``gradᵀ x`` over the batch. An optimiser that forms it
tile by tile and updates the weight at once saves writing and reading as many numbers as the weight has. For one
backward pass such an optimiser puts a ``GradientSink`` on a weight; the backward passes of the ops then hand these
factors to the sink and return no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

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

    @classmethod
    def of(cls, step: int, group: Mapping[str, Any]) -> AdamNumbers:
        """Returns those of a parameter in a group of ``torch.optim.Adam``."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        decoupled = bool(group.get("decoupled_weight_decay", False))
        lr, eps, weight_decay = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
        return cls(step, lr, beta1, beta2, eps, weight_decay, decoupled, bool(group["maximize"]))

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

    def squared_norm(self) -> Tensor | float:
        """Returns the sum of the squares of the gradient; on a GPU a tensor, so that nothing waits for it here."""
        square: Tensor | float = self._backend().squared_norm(*self._arguments())
        return self.scale**2 * square

    def grad_weight(self) -> Tensor:
        """Returns the gradient itself, packed."""
        result: Tensor = self._backend().grad_weight_of(*self._arguments())
        return result.mul_(self.scale)


class GradientSink(Protocol):
    """Consumes the gradient of a weight in factored form: applies it or keeps it, in place of the weight's ``grad``.

    Attributes:
        node: the node of the autograd graph that the gradient comes from; what reaches the weight from others is not
            for this sink.
        updates_at_once: the weight is updated as soon as its gradient is known; else the factors are kept.
    """

    @property
    def node(self) -> object: ...

    @property
    def updates_at_once(self) -> bool: ...

    def begin_update(self) -> Update:
        """Returns what the caller must now update the weight with: where ``updates_at_once``, in place of ``take``."""
        ...

    def take(self, factors: Factors, need_inputs: bool) -> tuple[Tensor, ...]:
        """Keeps or applies the gradient; returns what ``Factors.grad_inputs`` does."""
        ...


def set_sink(weight: Tensor, sink: GradientSink | None) -> None:
    """Puts a sink on a weight, or removes the one that is there.

    Raises:
        RuntimeError: the weight has a sink already.
    """
    if sink is None:
        weight.__dict__.pop("_gradient_sink", None)
    elif weight.__dict__.setdefault("_gradient_sink", sink) is not sink:
        raise RuntimeError("the weight has a gradient sink already: another minimize() of the same weight is running")


def sink_of(weight: Tensor, node: object) -> GradientSink | None:
    """Returns the sink of a weight for gradients from this node of the autograd graph, if it has one."""
    sink: GradientSink | None = getattr(weight, "_gradient_sink", None)
    return sink if sink is not None and sink.node is node else None
