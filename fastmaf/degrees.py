"""Degrees: which unit of a MADE may see which.

Inputs have the degrees 1..D in the order in which they are generated. A hidden unit of degree m sees what has degree
<= m in the layer before it; the output of degree d sees hidden units of degree < d. Units are kept sorted by degree, a
relabelling that leaves the function unchanged and makes every mask a staircase (Germain et al. 2015, MADE, section 3).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

DegreeKind: TypeAlias = Literal["spread", "random", "cyclic"]
OrderKind: TypeAlias = Literal["natural", "alternate", "random"]


class ConnectivityWarning(UserWarning):
    """The chosen degrees leave inputs that nothing reads, or outputs that nothing conditions."""


def input_degrees(features: int) -> Tensor:
    """Returns the degrees 1..features of the inputs, in the order of generation."""
    return torch.arange(1, features + 1, device="cpu")


def hidden_degrees(
    degrees: DegreeKind | Sequence[Tensor],
    features: int,
    hidden_features: Sequence[int],
    *,
    levels: int | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Returns the sorted degrees of each hidden layer's units.

    Args:
        degrees: ``"spread"``: evenly over 1..D-1, the same in every layer, so that every input is read and every
            output but the first is conditioned. ``"random"``: drawn uniformly from 1..D-1, anew for each layer
            (Papamakarios et al. 2017). ``"cyclic"``: 1, 2, .., D-1, 1, 2, .. as nflows, zuko and normflows have it.
            Or the degrees themselves, an integer tensor per hidden layer, each entry in 0..D (0 sees nothing).
        features: D.
        hidden_features: units of each hidden layer.
        levels: at most this many distinct degrees over all hidden layers.
        generator: for ``"random"``; None takes torch's global one.

    Returns:
        One int64 tensor ``[H]`` per hidden layer, in ascending order.

    Raises:
        ValueError: an argument does not fit; the message says what was expected and found.
    """
    if features < 1:
        raise ValueError(f"features must be at least 1; found {features}")
    if not hidden_features or min(hidden_features) < 1:
        raise ValueError(
            f"hidden_features must name at least one layer, each of at least one unit; found {tuple(hidden_features)}"
        )
    if levels is not None and levels < 1:
        raise ValueError(f"levels must be at least 1, or None for no limit; found {levels}")
    if not isinstance(degrees, str):
        result = [_check_explicit(k, d, h, features) for k, (d, h) in enumerate(_paired(degrees, hidden_features))]
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
        result = [
            torch.randint(1, top + 1, (h,), generator=generator, device="cpu").sort().values for h in hidden_features
        ]
    elif degrees == "cyclic":
        result = [(torch.arange(h, device="cpu") % top + 1).sort().values for h in hidden_features]
    else:
        raise ValueError(
            f"degrees must be 'spread', 'random', 'cyclic' or one tensor per hidden layer; found {degrees!r}"
        )
    return result if levels is None else _group(result, levels)


def _paired(degrees: Sequence[Tensor], hidden_features: Sequence[int]) -> list[tuple[Tensor, int]]:
    if len(degrees) != len(hidden_features):
        raise ValueError(
            f"explicit degrees need one tensor per hidden layer: expected {len(hidden_features)}, found {len(degrees)}"
        )
    return list(zip(degrees, hidden_features, strict=True))


def _tensor(numbers: Tensor | Sequence[int]) -> Tensor:
    return numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, device="cpu")


def _check_explicit(layer: int, degrees: Tensor, hidden: int, features: int) -> Tensor:
    degrees = _tensor(degrees)
    if degrees.shape != (hidden,) or degrees.is_floating_point() or degrees.dtype == torch.bool:
        raise ValueError(
            f"degrees of hidden layer {layer} must be {hidden} integers; found shape {tuple(degrees.shape)}, dtype "
            f"{degrees.dtype}"
        )
    degrees = degrees.detach().to("cpu", torch.int64).sort().values
    if int(degrees[0]) < 0 or int(degrees[-1]) > features:
        raise ValueError(
            f"degrees of hidden layer {layer} must lie in 0..{features}; found {int(degrees[0])}..{int(degrees[-1])}"
        )
    return degrees


def _spread(hidden: int, top: int) -> Tensor:
    if hidden == 1:
        return torch.tensor([(top + 1) // 2], device="cpu")
    # Both ends are met: the first unit lets output 2 be conditioned, the last one lets input D-1 be read.
    return 1 + (torch.arange(hidden, device="cpu") * (top - 1) + (hidden - 1) // 2) // (hidden - 1)


def _group(degrees: list[Tensor], levels: int) -> list[Tensor]:
    """Moves every degree to the nearest (by rank) of ``levels`` of the distinct ones, spread evenly, both ends
    included.
    """
    distinct = torch.unique(torch.cat(degrees))
    count = distinct.numel()
    if count <= levels:
        return degrees
    kept = _spread(levels, count) - 1  # ranks of the degrees that stay
    nearest = torch.bucketize(torch.arange(count, device="cpu"), (kept[1:] + kept[:-1]) / 2)
    return [distinct[kept[nearest[torch.searchsorted(distinct, d)]]] for d in degrees]


def orders(
    order: OrderKind | Sequence[Tensor], features: int, blocks: int, *, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Returns, for each block, the dimensions in the order in which it generates them.

    Args:
        order: ``"natural"``: 0, 1, .., D-1 in every block. ``"alternate"``: reversed in every second block.
            ``"random"``: a permutation drawn for each block. Or the permutations themselves, ``blocks`` integer
                tensors ``[D]``.
        features: D.
        blocks: how many blocks.
        generator: for ``"random"``; None takes torch's global one.

    Raises:
        ValueError: an argument does not fit.
    """
    natural = torch.arange(features, device="cpu")
    if not isinstance(order, str):
        if len(order) != blocks:
            raise ValueError(
                f"an explicit order needs one permutation per block: expected {blocks}, found {len(order)}"
            )
        return [check_permutation(f"order of block {i}", _tensor(o), features) for i, o in enumerate(order)]
    if order == "natural":
        return [natural] * blocks
    if order == "alternate":
        return [natural.flip(0) if i % 2 else natural for i in range(blocks)]
    if order == "random":
        return [torch.randperm(features, generator=generator, device="cpu") for _ in range(blocks)]
    raise ValueError(f"order must be 'natural', 'alternate', 'random' or one permutation per block; found {order!r}")


def check_permutation(name: str, permutation: Tensor, features: int) -> Tensor:
    """Returns a copy of ``permutation`` as int64 on the CPU; raises ValueError unless it holds each of 0..D-1 once."""
    if permutation.is_floating_point() or permutation.dtype == torch.bool or permutation.shape != (features,):
        raise ValueError(
            f"{name} must hold {features} integers, a permutation of 0..{features - 1}; "
            f"found shape {tuple(permutation.shape)}, dtype {permutation.dtype}"
        )
    permutation = permutation.detach().to("cpu", torch.int64, copy=True)
    if not torch.equal(permutation.sort().values, torch.arange(features, device="cpu")):
        raise ValueError(f"{name} must be a permutation of 0..{features - 1}; found repeated or other numbers")
    return permutation


def prefix(in_degrees: Tensor, out_degrees: Tensor, *, strict: bool) -> Tensor:
    """Returns how many units each output unit sees: ``#{i: in[i] < out[j]}`` when strict, ``<=`` otherwise. Both
    must be sorted.
    """
    return torch.searchsorted(in_degrees, out_degrees, right=not strict)


class Connectivity(NamedTuple):
    """What a MADE's degrees leave out.

    Attributes:
        read: inputs of degree 1..read can condition some output; those beyond cannot.
        unconditioned: outputs of degree 1..unconditioned depend on no input (the first never does).
        features: D.
    """

    read: int
    unconditioned: int
    features: int

    @property
    def complete(self) -> bool:
        """Whether every input but the last is read and every output but the first is conditioned."""
        return self.read >= self.features - 1 and self.unconditioned <= 1

    def __str__(self) -> str:
        parts = []
        if self.read < self.features - 1:
            unread = self.features - 1 - self.read
            parts.append(
                f"inputs {self.read + 1} to {self.features - 1} of the order ({unread} of {self.features - 1}) are "
                f"read by no output"
            )
        if self.unconditioned > 1:
            parts.append(
                f"outputs 2 to {self.unconditioned} ({self.unconditioned - 1} of {self.features - 1}) are "
                f"conditioned on nothing"
            )
        return " and ".join(parts) or "every input is read and every output is conditioned"


def connectivity(features: int, degrees: Sequence[Tensor]) -> Connectivity:
    """Returns what the sorted hidden degrees of one MADE leave unread and unconditioned."""
    read, lowest = features - 1, 1
    for layer in reversed(degrees):
        below = layer[layer <= read]
        read = int(below[-1]) if below.numel() else 0
    for layer in degrees:
        above = layer[layer >= lowest]
        lowest = int(above[0]) if above.numel() else features
    return Connectivity(read, min(lowest, features), features)


def warn_if_disconnected(features: int, degrees_of_blocks: Sequence[Sequence[Tensor]]) -> None:
    """Warns once, in words, where the degrees of some blocks leave inputs unread or outputs unconditioned."""
    reports = [connectivity(features, degrees) for degrees in degrees_of_blocks]
    lacking = [report for report in reports if not report.complete]
    if not lacking:
        return
    worst = max(lacking, key=lambda report: (features - report.read) + report.unconditioned)
    warnings.warn(
        f"in {len(lacking)} of {len(reports)} MADE blocks the hidden degrees leave gaps; the widest: {worst}. "
        "The density stays exact, but those dependencies cannot be learnt: use degrees='spread', or at least "
        f"{features - 1} hidden units where degrees are 'cyclic' (in nflows, zuko and normflows fewer have the same "
        f"gap).",
        ConnectivityWarning,
        stacklevel=3,
    )
