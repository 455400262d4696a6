"""Degrees of the units of a MADE, which determine the masks.

Inputs have the degrees 1..D in the order in which they are generated. A hidden unit of degree m sees the units of
degree <= m in the layer below; the output of degree d sees the hidden units of degree < d. Units are sorted by degree,
a relabelling that leaves the function unchanged and makes every mask a staircase.

References:
    Germain, Gregor, Murray and Larochelle 2015, MADE: Masked Autoencoder for Distribution Estimation, section 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastmaf.validation import as_integer, as_sizes

DegreeKind: TypeAlias = Literal["spread", "random", "cyclic"]
OrderKind: TypeAlias = Literal["natural", "alternate", "random"]


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


def layer_sizes(hidden_features: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the number of units of each hidden layer; an integer gives one layer.

    Raises:
        TypeError: ``hidden_features`` is neither an integer nor a sequence of integers.
        ValueError: there is no layer, or one without units.
    """
    sizes = as_sizes("hidden_features", hidden_features, least=1)
    if not sizes:
        raise ValueError(f"hidden_features must name at least one layer; found {hidden_features!r}")
    return sizes


def check_features(features: int) -> int:
    """Returns the number of dimensions as an int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is smaller than 1.
    """
    features = as_integer("features", features)
    if features < 1:
        raise ValueError(f"features must be at least 1; found {features}")
    return features


def input_degrees(features: int) -> Tensor:
    """Returns the degrees 1..features of the inputs, in the order of generation."""
    return torch.arange(1, features + 1, device="cpu")


def hidden_degrees(
    degrees: DegreeKind | Sequence[Tensor],
    features: int,
    hidden_features: int | Sequence[int],
    *,
    levels: int | None = None,
    residual: bool = False,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Returns the sorted degrees of the units of each hidden layer.

    Args:
        degrees: ``"spread"``: evenly over 1..D-1, the same in every layer, so that every input is read and every
            output but the first is conditioned. ``"random"``: drawn uniformly from 1..D-1 for each layer
            (Papamakarios et al. 2017). ``"cyclic"``: 1, 2, .., D-1, 1, 2, .. as in nflows, zuko and normflows.
            Explicit degrees: one integer tensor per hidden layer, entries in 0..D (a unit of degree 0 sees no input).
        features: D.
        hidden_features: number of units of each hidden layer.
        levels: maximum number of distinct degrees over all hidden layers.
        residual: the first, third, fifth, … layer have the same degrees, as residual sums need.
        generator: source of randomness for ``"random"``; None uses torch's global generator.

    Returns:
        One int64 tensor ``[H]`` per hidden layer, in ascending order.

    Raises:
        TypeError: ``features`` or ``levels`` is not an integer, or ``hidden_features`` is neither an integer nor a
            sequence of integers.
        ValueError: an argument is out of range; the message states what was expected and found.

    Example:
        >>> from fastmaf.degrees import hidden_degrees
        >>> hidden_degrees("spread", features=9, hidden_features=(4, 3))
        [tensor([1, 3, 6, 8]), tensor([1, 5, 8])]
    """
    features = check_features(features)
    hidden_features = layer_sizes(hidden_features)
    levels = None if levels is None else as_integer("levels", levels)
    if levels is not None and levels < 1:
        raise ValueError(f"levels must be at least 1, or None for no limit; found {levels}")
    if residual and (len(hidden_features) % 2 == 0 or len(set(hidden_features[::2])) > 1):
        raise ValueError(
            "a residual network needs hidden_features for a first layer and for two layers per residual block, with "
            f"equal sizes of the first, third, fifth, …: such as (64, 64, 64); found {hidden_features}"
        )
    if not isinstance(degrees, str):
        if len(degrees) != len(hidden_features):
            raise ValueError(
                f"explicit degrees need one tensor per hidden layer: expected {len(hidden_features)}, "
                f"found {len(degrees)}"
            )
        result = [
            _explicit_degrees(f"degrees of hidden layer {k}", degrees[k], units, features)
            for k, units in enumerate(hidden_features)
        ]
        if residual and not all(torch.equal(result[0], other) for other in result[2::2]):
            raise ValueError(
                "a residual network adds layer to layer: the explicit degrees of the first, third, fifth, … hidden "
                "layer must be equal"
            )
        distinct = torch.unique(torch.cat(result)).numel()
        if levels is not None and distinct > levels:
            raise ValueError(
                f"explicit degrees have {distinct} distinct values, more than levels={levels}: pass grouped "
                f"degrees, or no levels"
            )
        return result
    top = max(features - 1, 1)
    if degrees == "spread":
        result = [_spread(h, top) for h in hidden_features]
    elif degrees == "random":
        result = [torch.randint(1, top + 1, (h,), generator=generator, device="cpu") for h in hidden_features]
    elif degrees == "cyclic":
        result = [torch.arange(h, device="cpu") % top + 1 for h in hidden_features]
    else:
        raise ValueError(
            f"degrees must be 'spread', 'random', 'cyclic' or one tensor per hidden layer; found {degrees!r}"
        )
    result = [layer.sort().values for layer in result]
    if residual:
        result[::2] = [result[0]] * len(result[::2])
    return result if levels is None else _group(result, levels)


def _integers(name: str, numbers: Tensor | Sequence[int], count: int) -> Tensor:
    """Returns a copy of ``count`` integers as int64 on the CPU."""
    numbers = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, device="cpu")
    if numbers.shape != (count,) or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise ValueError(f"{name} must be {count} integers; found shape {tuple(numbers.shape)}, dtype {numbers.dtype}")
    return numbers.detach().to("cpu", torch.int64, copy=True)


def _explicit_degrees(name: str, degrees: Tensor | Sequence[int], units: int, features: int) -> Tensor:
    result = _integers(name, degrees, units).sort().values
    if int(result[0]) < 0 or int(result[-1]) > features:
        raise ValueError(f"{name} must lie in 0..{features}; found {int(result[0])}..{int(result[-1])}")
    return result


def _spread(hidden: int, top: int) -> Tensor:
    if hidden == 1:
        return torch.tensor([(top + 1) // 2], device="cpu")
    # Degree 1 conditions output 2; degree D-1 reads input D-1.
    return 1 + (torch.arange(hidden, device="cpu") * (top - 1) + (hidden - 1) // 2) // (hidden - 1)


def _group(degrees: list[Tensor], levels: int) -> list[Tensor]:
    """Replaces every degree by the nearest (by rank) of ``levels`` distinct ones, which are spread evenly and include
    the smallest and the largest.
    """
    distinct = torch.unique(torch.cat(degrees))
    count = distinct.numel()
    if count <= levels:
        return degrees
    remaining = _spread(levels, count) - 1  # ranks of the remaining degrees
    nearest = torch.bucketize(torch.arange(count, device="cpu"), (remaining[1:] + remaining[:-1]) / 2)
    return [distinct[remaining[nearest[torch.searchsorted(distinct, d)]]] for d in degrees]


def orders(
    order: OrderKind | Sequence[Tensor], features: int, blocks: int, *, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Returns the order in which each block generates the dimensions.

    Args:
        order: ``"natural"``: 0, 1, .., D-1 in every block. ``"alternate"``: reversed in every second block.
            ``"random"``: a random permutation for each block. Explicit orders: ``blocks`` integer tensors ``[D]``.
        features: D.
        blocks: number of blocks.
        generator: source of randomness for ``"random"``; None uses torch's global generator.

    Returns:
        One int64 tensor ``[D]`` per block.

    Raises:
        ValueError: an argument is out of range; the message states what was expected and found.

    Example:
        >>> from fastmaf.degrees import orders
        >>> orders("alternate", features=3, blocks=2)
        [tensor([0, 1, 2]), tensor([2, 1, 0])]
    """
    natural = torch.arange(features, device="cpu")
    if not isinstance(order, str):
        if len(order) != blocks:
            raise ValueError(
                f"an explicit order needs one permutation per block: expected {blocks}, found {len(order)}"
            )
        return [check_permutation(f"order of block {i}", o, features) for i, o in enumerate(order)]
    if order == "natural":
        return [natural] * blocks
    if order == "alternate":
        return [natural.flip(0) if i % 2 else natural for i in range(blocks)]
    if order == "random":
        return [torch.randperm(features, generator=generator, device="cpu") for _ in range(blocks)]
    raise ValueError(f"order must be 'natural', 'alternate', 'random' or one permutation per block; found {order!r}")


def check_permutation(name: str, permutation: Tensor | Sequence[int], features: int) -> Tensor:
    """Returns a copy of ``permutation`` as int64 on the CPU.

    Raises:
        ValueError: it is not a permutation of 0..D-1.
    """
    result = _integers(name, permutation, features)
    if not torch.equal(result.sort().values, torch.arange(features, device="cpu")):
        raise ValueError(f"{name} must be a permutation of 0..{features - 1}; found repeated or other numbers")
    return result


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
