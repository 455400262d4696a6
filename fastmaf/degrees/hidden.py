"""Degrees of the inputs and of the hidden units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fastmaf.validation import as_integer, as_integers, as_sizes

DegreeKind: TypeAlias = Literal["spread", "random", "cyclic"]


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
        return _explicit(degrees, features, hidden_features, levels, residual)
    result = [layer.sort().values for layer in _of_kind(degrees, features, hidden_features, generator)]
    if residual:
        result[::2] = [result[0]] * len(result[::2])
    return result if levels is None else _group(result, levels)


def _explicit(
    degrees: Sequence[Tensor], features: int, hidden_features: tuple[int, ...], levels: int | None, residual: bool
) -> list[Tensor]:
    """Returns explicit degrees, after checks."""
    if len(degrees) != len(hidden_features):
        raise ValueError(
            f"explicit degrees need one tensor per hidden layer: expected {len(hidden_features)}, found {len(degrees)}"
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


def _of_kind(
    kind: str, features: int, hidden_features: tuple[int, ...], generator: torch.Generator | None
) -> list[Tensor]:
    """Returns the degrees of each hidden layer, in any order."""
    top = max(features - 1, 1)
    if kind == "spread":
        return [_spread(h, top) for h in hidden_features]
    if kind == "random":
        return [torch.randint(1, top + 1, (h,), generator=generator, device="cpu") for h in hidden_features]
    if kind == "cyclic":
        return [torch.arange(h, device="cpu") % top + 1 for h in hidden_features]
    raise ValueError(f"degrees must be 'spread', 'random', 'cyclic' or one tensor per hidden layer; found {kind!r}")


def _explicit_degrees(name: str, degrees: Tensor | Sequence[int], units: int, features: int) -> Tensor:
    result = as_integers(name, degrees, units).sort().values
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
