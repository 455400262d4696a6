"""Packed-weight gradients in factored (outer-product) form, for optimisers that never store them.

The gradient of a weight is an outer product of small matrices: ``gradᵀ x`` over the batch. An optimiser that forms it
panel by panel and updates the weight at once saves writing and reading as many numbers as the weight has. For one
backward pass such an optimiser puts a ``GradientSink`` on a weight; the backward passes of the ops then hand these
factors to the sink and return no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.affine_output.args import AffineArgs, AffineBatch
from fastmaf.kernels.affine_output.torch import grad_product, product_batch
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.masked_linear.args import LinearArgs, LinearBatch
from fastmaf.kernels.masked_linear.torch import grad_activation


class FactoredGrad(NamedTuple):
    """The gradient of a packed weight, as one backward pass of a layer gives it.

    Attributes:
        op: ``"masked_linear"`` or ``"affine_output"``.
        batch: the op's tensors that have the batch as their first dimension.
        args: the layer.
        scale: a factor of the gradient.
    """

    op: str
    batch: LinearBatch | AffineBatch
    args: LinearArgs | AffineArgs
    scale: float = 1.0

    def _backend(self) -> Any:
        return implementation(self.op, self.batch[0])

    def grad_inputs(self, need_inputs: bool) -> tuple[Tensor, ...]:
        """Returns the gradients of everything but the weight; empty tensors where the inputs' are not needed."""
        grad, _, *others = self._backend().backward(self.batch, self.args, need_inputs, False)
        return grad, *others

    def adam_(self, update: Update, *, need_inputs: bool = False) -> tuple[Tensor, ...]:
        """Takes a step of Adam with the gradient, in place; returns the gradients of ``grad_inputs``.

        With a scale other than 1 only the step is valid, not the gradients that are returned.
        """
        return self._backend().adam_(self.batch, self.args, need_inputs, update._replace(scale=self.scale))

    def as_product(self) -> tuple[FactoredGrad, Tensor | None]:
        """Returns the gradient as that of a layer without activation, which depends on two matrices alone: the factors
        ``batch.grad_y`` ``[N, out]`` and ``batch.x`` ``[N, in]``. Beside it, of an output layer, stands the gradient of
        ``x`` through the element-wise map.
        """
        if isinstance(self.batch, AffineBatch):
            assert isinstance(self.args, AffineArgs)
            g, direct = grad_product(self.batch, self.args)
            return FactoredGrad("masked_linear", product_batch(g, self.batch), self.args.linear, self.scale), direct
        assert isinstance(self.args, LinearArgs)
        g = grad_activation(self.batch.grad_y, self.batch.y, self.args.activation)
        batch, args = LinearBatch(g, self.batch.x, g), self.args._replace(activation="identity")
        return FactoredGrad("masked_linear", batch, args, self.scale), None

    def scaled(self, factor: float) -> FactoredGrad:
        """Returns ``factor`` times this gradient."""
        return self._replace(scale=self.scale * factor)

    def squared_norm(self) -> Tensor | float:
        """Returns the sum of the squares of the gradient; on a GPU a tensor, so that nothing waits for it here."""
        square: Tensor | float = self._backend().squared_norm(self.batch, self.args)
        return self.scale**2 * square

    def grad_weight(self) -> Tensor:
        """Returns the gradient itself, packed."""
        result: Tensor = self._backend().backward(self.batch, self.args, False, True)[1]
        return result.mul_(self.scale)


class GradientSink:
    """Consumes the gradient of a weight in factored form, in place of the weight's ``grad``.

    Args:
        node: the node of the autograd graph whose gradient is consumed; gradients from other nodes are not. None for a
            sink that a backward pass is given directly.
        begin_update: returns the moments and scalars with which the weight is updated as soon as its gradient is known;
            None: the gradient is kept.

    Attributes:
        factors: the gradient that was kept, after the backward pass.
    """

    def __init__(self, node: object, begin_update: Callable[[], Update] | None = None) -> None:
        self.node, self.begin_update = node, begin_update
        self.factors: FactoredGrad | None = None

    def take(self, grad: FactoredGrad, need_inputs: bool) -> tuple[Tensor, ...]:
        """Applies or keeps the gradient; returns the gradients of ``FactoredGrad.grad_inputs``."""
        if self.begin_update is not None:
            return grad.adam_(self.begin_update(), need_inputs=need_inputs)
        self.factors = grad
        return grad.grad_inputs(need_inputs)


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
