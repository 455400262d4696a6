"""The gradient sinks of ``FusedAdam.minimize``, and the backward pass that fills them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.factored_grad import FactoredGrad, GradientSink, set_sink


def single_uses(loss: Tensor) -> list[tuple[Tensor, object]]:
    """Returns the leaves that a loss uses exactly once, each with the node of the autograd graph that uses it.

    The gradient of any other leaf is a sum over several nodes, of which each knows only its own term.
    """
    uses: dict[int, tuple[Tensor, object]] = {}  # by id, as torch computes a tensor's hash in Python
    used_again: set[int] = set()
    stack: list[Any] = [loss.grad_fn]
    seen = {loss.grad_fn}
    while stack:
        node = stack.pop()
        for next_node, _ in node.next_functions:
            if type(next_node).__name__ == "AccumulateGrad":
                leaf = next_node.variable
                if id(leaf) in uses:
                    used_again.add(id(leaf))
                uses[id(leaf)] = leaf, node
            elif next_node is not None and next_node not in seen:
                seen.add(next_node)
                stack.append(next_node)
    return [use for key, use in uses.items() if key not in used_again]


def has_hooks(parameter: Tensor) -> bool:
    """Returns whether hooks are registered on the gradient of a parameter."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def backward(loss: Tensor, sinks: Sequence[tuple[Tensor, GradientSink]]) -> None:
    """Runs ``loss.backward()`` with sinks on some weights, and removes the sinks.

    Raises:
        RuntimeError: a weight already has a sink; nothing was changed.
    """
    placed: list[Tensor] = []
    try:
        for weight, sink in sinks:
            set_sink(weight, sink)
            placed.append(weight)
        loss.backward()
    finally:
        for weight in placed:
            set_sink(weight, None)


class Gradients(NamedTuple):
    """The gradients of one backward pass.

    Attributes:
        factored: factored gradients by weight.
        stored: gradient tensors by parameter.
    """

    factored: dict[Tensor, FactoredGrad]
    stored: dict[Tensor, Tensor]

    @classmethod
    @torch.no_grad()
    def collect(cls, sinks: Sequence[tuple[Tensor, GradientSink]], parameters: Iterable[Tensor]) -> Gradients:
        """Returns the gradients that a backward pass left in ``sinks`` and in the ``grad`` of ``parameters``."""
        factored = {weight: sink.factors for weight, sink in sinks if sink.factors is not None}
        stored = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        for weight in factored.keys() & stored.keys():  # also used in a part of the graph that autograd does not show
            stored[weight].add_(factored.pop(weight).grad_weight())
        return cls(factored, stored)

    @torch.no_grad()
    def squared_norm(self) -> Tensor | float:
        """Returns the square of the common L2 norm of all gradients; on a GPU a tensor, so as not to wait for it."""
        squares = [factors.squared_norm() for factors in self.factored.values()]
        if self.stored:
            squares.append(torch.nn.utils.get_total_norm(list(self.stored.values())).double().square())
        return sum(squares)
