"""What degrees let through: the prefix that each unit sees, and the dependencies of outputs on inputs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class ConnectivityWarning(UserWarning):
    """The degrees leave inputs that no output reads, or outputs that depend on no input.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     flow = fastmaf.MAF(features=100, blocks=1, hidden_features=16, degrees="cyclic")
        >>> caught[0].category.__name__
        'ConnectivityWarning'
    """


def prefix(in_degrees: Tensor, out_degrees: Tensor, *, strict: bool) -> Tensor:
    """Returns how many input units each output unit sees, int64 ``[out]``, for degrees in ascending order:
    ``#{i: in[i] <= out[j]}``, or ``<`` with ``strict``.
    """
    # By NumPy, on this thread: waiting for others would take longer than the search.
    inputs, outputs = in_degrees.numpy(), out_degrees.numpy()
    if len(outputs) <= len(inputs):
        return torch.from_numpy(inputs.searchsorted(outputs, "left" if strict else "right"))
    # Each of the fewer units is looked for: the first output that sees an input, then the inputs before each output.
    first_output = outputs.searchsorted(inputs, "right" if strict else "left")
    return torch.from_numpy(np.bincount(first_output, minlength=len(outputs) + 1)[:-1].cumsum())


class Connectivity(NamedTuple):
    """The dependencies that the degrees of a MADE allow.

    Attributes:
        unread: number of inputs but the last that condition no output: those of the highest degrees.
        unconditioned: number of outputs but the first that depend on no input: those of the lowest degrees.
    """

    unread: int
    unconditioned: int


def connectivity(features: int, degrees: Sequence[Tensor]) -> Connectivity:
    """Returns the dependencies that the sorted hidden degrees of a MADE allow."""
    highest_read, lowest = features - 1, 1
    for layer in reversed(degrees):
        below = layer[layer <= highest_read]
        highest_read = int(below[-1]) if below.numel() else 0
    for layer in degrees:
        above = layer[layer >= lowest]
        lowest = int(above[0]) if above.numel() else features
    return Connectivity(features - 1 - highest_read, min(lowest, features) - 1)


def warn_if_disconnected(features: int, degrees_of_blocks: Sequence[Sequence[Tensor]]) -> None:
    """Warns once if the degrees of some blocks leave inputs unread or outputs unconditioned."""
    reports = [connectivity(features, degrees) for degrees in degrees_of_blocks]
    unread, unconditioned = max(reports, key=sum)
    if not unread and not unconditioned:
        return
    gaps = []
    if unread:
        gaps.append(
            f"inputs {features - unread} to {features - 1} of the order ({unread} of {features - 1}) are read by no "
            f"output"
        )
    if unconditioned:
        gaps.append(f"outputs 2 to {unconditioned + 1} ({unconditioned} of {features - 1}) are conditioned on nothing")
    warnings.warn(
        f"in {sum(map(any, reports))} of {len(reports)} MADE blocks the hidden degrees leave gaps; the widest: "
        f"{' and '.join(gaps)}. The density stays exact, but those dependencies cannot be learnt: use "
        "degrees='spread' with at least 2 units per hidden layer and 2 levels, or at least "
        f"{features - 1} hidden units where degrees are 'cyclic' (in nflows, zuko and normflows fewer have the same "
        "gap).",
        ConnectivityWarning,
        stacklevel=3,
    )
