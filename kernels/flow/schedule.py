"""The order in which an inverse can finish its units: one step per distinct degree of the last hidden layer.

An output of degree d reads the last hidden layer's units of degree < d, and nothing else. So all outputs between two
consecutive degrees of that layer share what they are conditioned on, and become known together. A hidden unit of an
earlier layer is finished with the first step that needs it; it adds no step of its own, whatever its degree is.

A step finishes few units, often a single one, while weights are stored in panels of 16 units. So steps are taken in
groups, each of about one panel of the last hidden layer, as in a blocked triangular solve:

    for each group, for each layer:
        ahead     the products of all its rows with everything below them that was finished before: whole panels
        solve     step by step, the products with the few columns that the group itself has finished so far

where the rows of a group are the outputs and the hidden units that its steps finish. All but a small part of the
weights is read in the first of the two, in large products. What an output reads in ``ahead`` was finished before the
group's first step; what a hidden unit reads there may include what that step finishes below it, so that a group of one
step has nothing to solve.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmaf.kernels.layout import PANEL


def level_schedule(in_degrees: Tensor, hidden_degrees: Sequence[Tensor]) -> Tensor:
    """Returns the schedule of a block.

    Args:
        in_degrees: ``[D]`` integers, sorted: the degrees of the inputs (and of their outputs).
        hidden_degrees: per hidden layer ``[H]`` integers, sorted.

    Returns:
        int32 ``[steps, 1 + hidden layers]``, on the CPU: the number of dimensions, then of each layer's units, that
        are finished after each step.
    """
    last = int(in_degrees[-1])  # a unit of the last degree feeds no output
    thresholds = hidden_degrees[-1][hidden_degrees[-1] < last].unique_consecutive()
    table = torch.zeros(len(thresholds) + 1, 1 + len(hidden_degrees), dtype=torch.int32, device="cpu")
    for column, degrees in zip(table.T, (in_degrees, *hidden_degrees), strict=True):
        # By NumPy: torch would share this little work out and wait for its threads.
        column[:-1] = torch.from_numpy(degrees.numpy().searchsorted(thresholds.numpy(), side="right"))
    # A last step for the outputs beyond the last threshold; units that no output reads are never computed.
    table[-1] = table[-2] if len(thresholds) else 0
    table[-1, 0] = in_degrees.numel()
    return table


def groups(schedule: Tensor, *, every_layer: bool = False) -> list[tuple[int, int]]:
    """Returns the groups of steps of a ``level_schedule``: the first step of each, and the step after its last.

    A group of several steps finishes units of one panel of the last hidden layer, or of one panel of each if
    ``every_layer``; a step that reaches beyond the panels in which it begins is a group of its own.
    """
    finished = schedule[:, 1 if every_layer else -1 :].tolist()
    result, first = [], 0
    while first < len(finished):
        before = finished[first - 1] if first else [0] * len(finished[0])
        limits = [units // PANEL * PANEL + PANEL for units in before]
        end = first + 1
        while end < len(finished) and all(units <= limit for units, limit in zip(finished[end], limits, strict=True)):
            end += 1
        result.append((first, end))
        first = end
    return result
