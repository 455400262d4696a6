"""Orders in which the blocks of a flow generate the dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fastmaf.validation import as_integers

OrderKind: TypeAlias = Literal["natural", "alternate", "random"]


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
    result = as_integers(name, permutation, features)
    if not torch.equal(result.sort().values, torch.arange(features, device="cpu")):
        raise ValueError(f"{name} must be a permutation of 0..{features - 1}; found repeated or other numbers")
    return result
