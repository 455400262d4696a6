"""An affine autoregressive block as the ops that take several of them in one call see it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.masked_linear.op import check_activation


class Block(NamedTuple):
    """One affine autoregressive block.

    Attributes:
        weights, biases, prefixes, tiles: of the hidden layers, then of the output layer, whose rows are interleaved
            (shift, raw log-scale).
        schedule: ``level_schedule`` of the block.
        activation: of the hidden layers.
        bound: log-scales stay within ± this; ``inf`` leaves them free.
        soft: bound by tanh instead of by a clamp.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    prefixes: list[Tensor]
    tiles: list[Tensor]
    schedule: Tensor
    activation: str
    bound: float
    soft: bool


class Chain(NamedTuple):
    """Several blocks, flat: the form in which an op receives them.

    Attributes:
        weights, biases, prefixes, tiles: of all layers of the first block, then of the second, and so on.
        schedules, bounds, softs: one entry per block; a schedule has as many columns as its block has layers.
        permutations: one entry per block, applied before it (``x[:, permutation]``), and one for after the last; empty
            where there is none.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    prefixes: list[Tensor]
    tiles: list[Tensor]
    schedules: list[Tensor]
    permutations: list[Tensor]
    activation: str
    bounds: list[float]
    softs: list[bool]

    def layers_of_blocks(self) -> list[range]:
        """Returns the numbers of each block's layers, the output layer last."""
        ends = list(itertools.accumulate((schedule.shape[1] for schedule in self.schedules), initial=0))
        return [range(*pair) for pair in itertools.pairwise(ends)]

    def layer(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns weight, bias, prefix and tiles of a layer."""
        return self.weights[i], self.biases[i], self.prefixes[i], self.tiles[i]


def chain(blocks: Sequence[Block], permutations: Sequence[Tensor | None]) -> Chain:
    """Returns ``blocks`` with the permutations before each and after the last as a chain.

    Raises:
        ValueError: there is no block, an activation is unknown, they differ, or permutations are not one more.
    """
    activations = {block.activation for block in blocks}
    if len(activations) != 1 or len(permutations) != len(blocks) + 1:
        raise ValueError(
            f"a chain needs blocks of one activation and one permutation more than blocks; found {len(blocks)} blocks, "
            f"activations {sorted(activations)}, {len(permutations)} permutations"
        )
    check_activation(activation := activations.pop())
    none = torch.empty(0, dtype=torch.int64, device=blocks[0].biases[0].device)
    return Chain(
        [weight.contiguous() for block in blocks for weight in block.weights],
        [bias.contiguous() for block in blocks for bias in block.biases],
        [prefix for block in blocks for prefix in block.prefixes],
        [table for block in blocks for table in block.tiles],
        [block.schedule for block in blocks],
        [none if permutation is None else permutation for permutation in permutations],
        activation,
        [block.bound for block in blocks],
        [block.soft for block in blocks],
    )


CHAIN_SCHEMA = (
    "Tensor[] weights, Tensor[] biases, Tensor[] prefixes, Tensor[] tiles, Tensor[] schedules,"
    " Tensor[] permutations, str activation, float[] bounds, bool[] softs"
)
