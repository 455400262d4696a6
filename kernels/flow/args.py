"""The arguments of ``flow_forward`` and ``flow_inverse``: autoregressive blocks with permutations between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastmaf.kernels.affine_output.args import AffineArgs
from fastmaf.kernels.masked_linear.args import LinearArgs, check_activation

T = TypeVar("T")


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

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    prefixes: Sequence[Tensor]
    tiles: Sequence[Tensor]
    schedule: Tensor
    activation: str
    bound: float
    soft: bool


class FlowArgs(NamedTuple):
    """Blocks in a row, flat: the form in which the ops of both directions receive them.

    Attributes:
        weights, biases, prefixes, tiles: of all layers of the first block, then of the second, and so on; contiguous.
        schedules, bounds, softs: one entry per block; a schedule has as many columns as its block has layers.
        permutations: one entry per block, applied before it (``x[:, permutation]``), and one for after the last; empty
            where there is none.
        activation: of all hidden layers.
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

    def hidden(self, layer: int) -> LinearArgs:
        """Returns a hidden layer, by its number."""
        return LinearArgs._make([*(part[layer] for part in self[:4]), self.activation])

    def output(self, block: int, layer: int) -> AffineArgs:
        """Returns the output layer of a block, by the numbers of both."""
        return AffineArgs._make([*(part[layer] for part in self[:4]), self.bounds[block], self.softs[block]])

    @property
    def parameters(self) -> list[Tensor]:
        """The weights, then the biases."""
        return [*self.weights, *self.biases]

    def with_parameters(self, parameters: Sequence[Tensor]) -> FlowArgs:
        """Returns the same blocks with other ``parameters``; or with none, to hold the rest."""
        weights, biases = halves(parameters)
        return self._replace(weights=weights, biases=biases)

    def single_blocks(self) -> list[FlowArgs]:
        """Returns each block as a flow of its own, with the permutation before it; the last has the final one, too."""
        none = self.schedules[0].new_empty(0, dtype=torch.int64)
        finals = [none] * (len(self.schedules) - 1) + [self.permutations[-1]]
        blocks = []
        for block, layers in enumerate(self.layers_of_blocks()):
            weights, biases, prefixes, tiles = (list(part[layers.start : layers.stop]) for part in self[:4])
            permutations = [self.permutations[block], finals[block]]
            rest = (self.activation, [self.bounds[block]], [self.softs[block]])
            blocks.append(FlowArgs(weights, biases, prefixes, tiles, [self.schedules[block]], permutations, *rest))
        return blocks

    def inverted(self) -> FlowArgs:
        """Returns the blocks in the order of inversion, with the inverses of the permutations."""
        layers = [i for block in reversed(self.layers_of_blocks()) for i in block]
        weights, biases, prefixes, tiles = ([part[i] for i in layers] for part in self[:4])
        permutations = [inverse_permutation(p) if p.numel() else p for p in reversed(self.permutations)]
        schedules, bounds, softs = self.schedules[::-1], self.bounds[::-1], self.softs[::-1]
        return FlowArgs(weights, biases, prefixes, tiles, schedules, permutations, self.activation, bounds, softs)


class FlowBatch(NamedTuple):
    """What a backward pass of ``flow_forward`` starts from.

    Attributes:
        grad_z, grad_ladj: ``[N, D]`` and ``[N]``, the gradients of the outputs.
        saved: what the forward pass saved; see ``saved.py``.
    """

    grad_z: Tensor
    grad_ladj: Tensor
    saved: Tensor


def halves(sequence: Sequence[T]) -> tuple[list[T], list[T]]:
    """Returns the weights' and the biases' entries of a sequence with one for each of both, in this order."""
    half = len(sequence) // 2
    return list(sequence[:half]), list(sequence[half:])


def permuted(x: Tensor, permutation: Tensor) -> Tensor:
    """Returns ``x[:, permutation]``, or ``x`` where the permutation is empty."""
    return x[:, permutation] if permutation.numel() else x


def inverse_permutation(permutation: Tensor) -> Tensor:
    """Returns the inverse of a permutation, int64 ``[D]``."""
    if permutation.shape[0] <= 512:  # one op is faster than the three below
        return permutation.argsort()
    indices = torch.arange(permutation.shape[0], device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, indices)


FLOW_SCHEMA = (
    "Tensor[] weights, Tensor[] biases, Tensor[] prefixes, Tensor[] tiles, Tensor[] schedules,"
    " Tensor[] permutations, str activation, float[] bounds, bool[] softs"
)


def flow_args(blocks: Sequence[Block], permutations: Sequence[Tensor | None]) -> FlowArgs:
    """Returns ``blocks``, with the permutations before each and after the last, as arguments of the ops.

    Args:
        blocks: in the order in which x passes through them, all of one activation.
        permutations: int64 ``[D]``, one per block, applied before it as ``x[:, permutation]``, and one for after the
            last; None where there is none.

    Raises:
        ValueError: there is no block, an activation is unknown, they differ, or permutations are not one more.
    """
    activations = {block.activation for block in blocks}
    if len(activations) != 1 or len(permutations) != len(blocks) + 1:
        raise ValueError(
            f"a flow needs blocks of one activation and one permutation more than blocks; found {len(blocks)} blocks, "
            f"activations {sorted(activations)}, {len(permutations)} permutations"
        )
    check_activation(activation := activations.pop())
    none = torch.empty(0, dtype=torch.int64, device=blocks[0].biases[0].device)
    return FlowArgs(
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
