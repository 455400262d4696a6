"""Affine functions of the units of a layer, of which the layers of a network are built."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """``factor`` times ``units`` units of the present layer, from ``start`` on; a number stands for a multiple of I."""

    factor: Tensor | float
    start: int
    units: int


class Affine(NamedTuple):
    """An affine function of the units of the present layer.

    Attributes:
        terms: its summands.
        bias: ``[size]``.
        degrees: the largest degree that each entry can see, int64 ``[size]``.
    """

    terms: list[Term]
    bias: Tensor
    degrees: Tensor

    @property
    def is_plain(self) -> bool:
        """Whether it consists of multiples of units."""
        return not any(isinstance(term.factor, Tensor) for term in self.terms)

    def __add__(self, other: Affine) -> Affine:  # type: ignore[override]
        degrees = torch.maximum(self.degrees, other.degrees)
        return Affine([*self.terms, *other.terms], self.bias + other.bias, degrees)

    def negated(self) -> Affine:
        """Returns −h."""
        return Affine([Term(-factor, start, count) for factor, start, count in self.terms], -self.bias, self.degrees)

    def scaled(self, scale: Tensor, shift: Tensor) -> Affine:
        """Returns scale · h + shift, entry by entry."""
        terms = []
        for factor, start, count in self.terms:
            rows = scale[:, None] * factor if isinstance(factor, Tensor) else torch.diag(scale * factor)
            terms.append(Term(rows, start, count))
        return Affine(terms, scale * self.bias + shift, self.degrees)

    def write_to(self, rows: Tensor, order: Tensor) -> None:
        """Adds the rows ``order`` of its matrix to ``rows`` ``[len(order), units]``."""
        natural = is_natural(order)
        for factor, start, count in self.terms:
            part = rows[:, start : start + count]
            if not isinstance(factor, Tensor):
                part[torch.arange(len(order)), order] += factor
            else:
                part += factor if natural else factor[order.to(factor.device)]


def is_natural(order: Tensor) -> bool:
    """Returns whether an order is 0, 1, 2, …"""
    return torch.equal(order, torch.arange(len(order)))
