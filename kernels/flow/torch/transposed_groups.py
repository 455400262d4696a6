"""Which steps of an inverse its backward pass solves together; see ``transposed_solve.py``."""

from __future__ import annotations

from typing import NamedTuple

from fastmaf.kernels.flow.schedule import groups
from fastmaf.kernels.flow.torch.network import Network
from fastmaf.kernels.flow.torch.plan import Rows, make_rows
from fastmaf.kernels.layout import runs_of
from fastmaf.kernels.tensor_cache import cached

# Multiply-adds of A up to which groups are taken together: calls of torch would cost more.
_SMALL = 1 << 21


class Group(NamedTuple):
    """Steps that are solved together.

    Attributes:
        rows: of each layer, hidden layers first, the output layer last.
        below: of each layer, the units of the layer below that the group finishes: dimensions of the first layer.
        several: whether there are several steps: its outputs may read its units of the last hidden layer.
        complete: whether it finishes some of each, so that these units may affect one another.
    """

    rows: list[Rows]
    below: list[slice]
    several: bool
    complete: bool


def groups_of(network: Network, n: int) -> list[Group]:
    """Returns the groups for ``n`` samples: those of ``schedule.groups``, and several of them together while that makes
    little arithmetic of A.
    """
    panels, schedule, residual = [layer.panels for layer in network.layers], network.schedule, network.residual

    def make() -> list[Group]:
        dims, *units = zip(*schedule.tolist(), strict=True)  # finished after each step
        runs, below = [runs_of(layer) for layer in panels], [(0, *finished) for finished in (dims, *units)]
        outputs = len(network.layers[-1].bias) // dims[-1]
        ends = [*units, [outputs * d for d in dims]]
        merged: list[tuple[int, int]] = []
        for first, end in groups(schedule, every_layer=True):
            start = merged[-1][0] if merged else first
            of_dims, of_first, *_, of_last = [of[end] - of[start] for of in (below if len(below) > 2 else below * 2)]
            if merged and outputs * of_dims * of_first * of_last * samples <= _SMALL:
                first, _ = merged.pop()
            merged.append((first, end))
        result = []
        for first, end in merged:
            rows = [make_rows(*of, first, end) for of in zip(runs, ends, below, strict=True)]
            finished = [slice(of[first], of[end]) for of in below]
            # Residual sums pass by the layers between them.
            needed = [finished[0], *(finished[1::2] if residual else finished[1:])]
            result.append(Group(rows, finished, end - first > 1, all(of.start < of.stop for of in needed)))
        return result

    samples = 1 << max(n - 1, 0).bit_length()
    return cached(schedule, ("groups of the transposed solve", samples, residual), make, also=panels)
