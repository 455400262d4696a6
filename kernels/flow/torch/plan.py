"""Which rows of each layer a group of steps of an inverse finishes, and which panels hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmaf.kernels.flow.schedule import groups
from fastmaf.kernels.layout import PANEL, Run, runs_of
from fastmaf.kernels.tensor_cache import cached

# Groups of no more weights than this are taken together: calls of torch would cost more than the arithmetic.
_SMALL = 131_072


class Rows(NamedTuple):
    """The rows of one layer that a group of steps finishes.

    Attributes:
        rows: all of them.
        counts: how many of them each step finishes.
        below: how many units of the layer below are finished when each step comes to them.
        runs: the panels that hold them, cut where their width changes; at least one panel, where there are no rows.
    """

    rows: slice
    counts: list[int]
    below: list[int]
    runs: list[Run]

    def matrix(self, packed: Tensor, columns: slice) -> Tensor:
        """Returns the weights of these rows as a matrix, with no more columns than the widest panel has."""
        parts = [run.of(packed)[:, columns].mT.flatten(0, 1) for run in self.runs]
        if len(parts) > 1:
            width = parts[-1].shape[1]
            parts = [torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])]
        (whole,) = parts
        return whole.narrow(0, self.rows.start - PANEL * self.runs[0].start, self.rows.stop - self.rows.start)


def plan_of(panels: Sequence[Tensor], schedule: Tensor, outputs: int = 2) -> list[list[Rows]]:
    """Returns, per group of steps, the rows of each layer: hidden layers first, the output layer last, which has
    ``outputs`` rows per dimension.
    """

    def make() -> list[list[Rows]]:
        return _make_plan([runs_of(layer) for layer in panels], schedule, outputs)

    return cached(schedule, ("plan", outputs), make, also=panels)


def _make_plan(layers: list[list[Run]], schedule: Tensor, outputs: int) -> list[list[Rows]]:
    dims, *units = zip(*schedule.tolist(), strict=True)  # finished after each step, the latter per hidden layer
    ends = [*units, [outputs * d for d in dims]]
    below = [dims, *units[:-1], (0, *units[-1][:-1])]  # outputs read what was finished before their step
    merged: list[tuple[int, int]] = []
    for first, end in groups(schedule):
        start = merged[-1][0] if merged else first
        weights = sum(_count(rows, start, end) * width[end - 1] for rows, width in zip(ends, below, strict=True))
        if merged and weights <= _SMALL:
            merged[-1] = start, end
        else:
            merged.append((first, end))
    return [[make_rows(*of, *group) for of in zip(layers, ends, below, strict=True)] for group in merged]


def _count(ends: Sequence[int], first: int, end: int) -> int:
    """Returns how many rows the steps ``first..end`` finish."""
    return ends[end - 1] - (ends[first - 1] if first else 0)


def make_rows(runs: list[Run], ends: Sequence[int], below: Sequence[int], first: int, end: int) -> Rows:
    """Returns the rows of a layer that the steps ``first..end`` finish.

    Args:
        runs: the layer's panels.
        ends: how many of its rows are finished after each step.
        below: see ``Rows``, of every step.
    """
    starts = [0, *ends]
    rows = slice(starts[first], starts[end])
    first_panel = min(rows.start // PANEL, runs[-1].end - 1)
    end_panel = max(-(-rows.stop // PANEL), first_panel + 1)
    cut = []
    for run in runs:
        start, stop = max(run.start, first_panel), min(run.end, end_panel)
        if start < stop:
            cut.append(Run(start, stop, run.width, run.offset + PANEL * run.width * (start - run.start)))
    counts = [after - before for before, after in zip(starts[first:end], starts[first + 1 : end + 1], strict=True)]
    return Rows(rows, counts, list(below[first:end]), cut)
