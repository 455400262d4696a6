"""Gradient sinks of ``FusedAdam.minimize``, which consume the gradients of packed weights in one backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.factored_grad import FactoredGrad, GradientSink, set_sink


class Updates(Protocol):
    """Begins steps of Adam on single parameters."""

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> Update:
        """Begins the update of a parameter of this group and returns its moments and scalars."""
        ...


class Applies:
    """A sink that updates its weight as soon as the gradient is known."""

    updates_at_once = True

    def __init__(self, node: object, updates: Updates, parameter: Tensor, group: dict[str, Any]) -> None:
        self.node, self._updates, self._parameter, self._group = node, updates, parameter, group

    def begin_update(self) -> Update:
        return self._updates.begin(self._parameter, self._group)

    def take(self, factors: FactoredGrad, need_inputs: bool) -> tuple[Tensor, ...]:
        return factors.adam_(self.begin_update(), need_inputs=need_inputs)


class Keeps:
    """A sink that keeps the gradient, in factored form."""

    updates_at_once = False

    def __init__(self, node: object) -> None:
        self.node = node
        self.factors: FactoredGrad | None = None

    def begin_update(self) -> Update:
        raise NotImplementedError("this sink keeps the gradient: give it to take()")

    def take(self, factors: FactoredGrad, need_inputs: bool) -> tuple[Tensor, ...]:
        self.factors = factors
        return factors.grad_inputs(need_inputs)


def single_uses(loss: Tensor) -> dict[Tensor, object]:
    """Returns the leaves that take part in a loss exactly once, each with the node of the graph that uses it.

    Of other leaves the gradient is a sum over several nodes, which none of them knows.
    """
    uses: dict[Tensor, object] = {}
    several: set[Tensor] = set()
    ahead: list[Any] = [loss.grad_fn]
    seen = {loss.grad_fn}
    while ahead:
        node = ahead.pop()
        for below, _ in node.next_functions:
            if type(below).__name__ == "AccumulateGrad":
                leaf = below.variable
                if leaf in uses:
                    several.add(leaf)
                uses[leaf] = node
            elif below is not None and below not in seen:
                seen.add(below)
                ahead.append(below)
    for leaf in several:
        del uses[leaf]
    return uses


def backward(loss: Tensor, sinks: Mapping[Tensor, GradientSink]) -> None:
    """Runs ``loss.backward()`` with sinks on some weights, which have none afterwards.

    Raises:
        RuntimeError: a weight has a sink already; nothing was changed.
    """
    placed: list[Tensor] = []
    try:
        for weight, sink in sinks.items():
            set_sink(weight, sink)
            placed.append(weight)
        loss.backward()
    finally:
        for weight in placed:
            set_sink(weight, None)


class Gradients(NamedTuple):
    """The gradients of one backward pass.

    Attributes:
        factored: by weight, in factored form.
        stored: by parameter, as tensors.
    """

    factored: dict[Tensor, FactoredGrad]
    stored: dict[Tensor, Tensor]

    @classmethod
    @torch.no_grad()
    def collect(cls, sinks: Mapping[Tensor, Keeps], parameters: Iterable[Tensor]) -> Gradients:
        """Returns the gradients that a backward pass has left in ``sinks`` and in the ``grad`` of ``parameters``."""
        factored = {weight: sink.factors for weight, sink in sinks.items() if sink.factors is not None}
        stored = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
        for both in factored.keys() & stored.keys():  # a part of the graph that was not seen
            stored[both].add_(factored.pop(both).grad_weight())
        return cls(factored, stored)

    @torch.no_grad()
    def squared_norm(self) -> Tensor | float:
        """Returns the square of the gradients' common L2 norm; on a GPU a tensor, so that nothing waits for it here."""
        squares = [factors.squared_norm() for factors in self.factored.values()]
        if self.stored:
            squares.append(torch.nn.utils.get_total_norm(list(self.stored.values())).double().square())
        return sum(squares)
