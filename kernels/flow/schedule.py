"""The order in which an inverse can finish its units: one step per distinct degree of the last hidden layer.

An output of degree d reads the last hidden layer's units of degree < d, and nothing else. So all outputs between two
consecutive degrees of that layer share what they are conditioned on, and become known together. A hidden unit of an
earlier layer is finished with the first step that needs it; it adds no step of its own, whatever its degree is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def level_schedule(in_degrees: Tensor, hidden_degrees: Sequence[Tensor]) -> Tensor:
    """Returns the schedule of a block.

    Args:
        in_degrees: ``[D]`` integers, sorted: the degrees of the inputs (and of their outputs).
        hidden_degrees: per hidden layer ``[H]`` integers, sorted.

    Returns:
        int32 ``[steps, 1 + hidden layers]``, on the CPU: the number of dimensions, then of each layer's units, that
        are finished after each step.
    """
    thresholds = torch.unique(hidden_degrees[-1])
    thresholds = thresholds[thresholds < in_degrees[-1]]  # a unit of the last degree feeds no output
    columns = [torch.searchsorted(degrees, thresholds, right=True) for degrees in (in_degrees, *hidden_degrees)]
    table = torch.stack(columns, dim=1).tolist()
    # A last step for the outputs beyond the last threshold; units that no output reads are never computed.
    table.append([in_degrees.numel(), *(table[-1][1:] if table else [0] * len(hidden_degrees))])
    return torch.tensor(table, dtype=torch.int32, device="cpu")
