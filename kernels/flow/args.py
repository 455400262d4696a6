"""The arguments of ``flow_forward`` and ``flow_inverse``: autoregressive blocks with permutations between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastmaf.kernels.affine_output.affine_map import AffineMap
from fastmaf.kernels.affine_output.args import AffineArgs
from fastmaf.kernels.float8 import BYTE, decoded
from fastmaf.kernels.masked_linear.args import LinearArgs, check_activation
from fastmaf.kernels.tensor_cache import cached

T = TypeVar("T")


class Block(NamedTuple):
    """One affine autoregressive block.

    Attributes:
        weights, biases, prefixes, panels: of the hidden layers, then of the output layer, whose rows are interleaved
            (shift, raw log-scale).
        schedule: ``level_schedule`` of the block.
        activation: of the hidden layers.
        map: the element-wise map.
        weight_scales: of the layers, or empty for 1; see ``LinearArgs``.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    prefixes: Sequence[Tensor]
    panels: Sequence[Tensor]
    schedule: Tensor
    activation: str
    map: AffineMap
    weight_scales: Sequence[float] = ()


class FlowArgs(NamedTuple):
    """Blocks in a row, flat: the form in which the ops of both directions receive them.

    Attributes:
        weights, biases, prefixes, panels: of all layers of the first block, then of the second, and so on; contiguous.
        schedules: one per block, with as many columns as the block has layers.
        permutations: one entry per block, applied before it (``x[:, permutation]``), and one for after the last; empty
            where there is none.
        activation: of all hidden layers.
        maps: the numbers of each block's ``AffineMap``, one block after the other.
        weight_scales: of all layers; see ``LinearArgs``.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    prefixes: list[Tensor]
    panels: list[Tensor]
    schedules: list[Tensor]
    permutations: list[Tensor]
    activation: str
    maps: list[float]
    weight_scales: list[float]

    def of_layers(self) -> tuple[list[Tensor], ...]:
        """Returns the fields with one tensor per layer; ``torch.compile`` of torch 2.7 cannot trace ``self[:4]``."""
        return self.weights, self.biases, self.prefixes, self.panels

    def layers_of_blocks(self) -> list[range]:
        """Returns the numbers of each block's layers, the output layer last."""
        blocks: list[range] = []
        for schedule in self.schedules:
            start = blocks[-1].stop if blocks else 0
            blocks.append(range(start, start + schedule.shape[1]))
        return blocks

    def hidden(self, layer: int) -> LinearArgs:
        """Returns a hidden layer, by its number."""
        return LinearArgs._make(
            [*(part[layer] for part in self.of_layers()), self.activation, self.weight_scales[layer]]
        )

    def output(self, block: int, layer: int) -> AffineArgs:
        """Returns the output layer of a block, by the numbers of both."""
        return AffineArgs._make(
            [*(part[layer] for part in self.of_layers()), self.map(block), self.weight_scales[layer]]
        )

    def map(self, block: int) -> AffineMap:
        """Returns the element-wise map of a block."""
        count = len(AffineMap._fields)
        return AffineMap(*self.maps[count * block : count * (block + 1)])

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
            weights, biases, prefixes, panels = (list(part[layers.start : layers.stop]) for part in self.of_layers())
            permutations = [self.permutations[block], finals[block]]
            scales = self.weight_scales[layers.start : layers.stop]
            rest = (permutations, self.activation, list(self.map(block)), scales)
            blocks.append(FlowArgs(weights, biases, prefixes, panels, [self.schedules[block]], *rest))
        return blocks

    def inverted(self) -> FlowArgs:
        """Returns the blocks in the order of inversion, with the inverses of the permutations."""
        layers = [i for block in reversed(self.layers_of_blocks()) for i in block]
        weights, biases, prefixes, panels = ([part[i] for i in layers] for part in self.of_layers())
        permutations = [inverse_permutation(p) if p.numel() else p for p in reversed(self.permutations)]
        maps = [number for block in reversed(range(len(self.schedules))) for number in self.map(block)]
        schedules = self.schedules[::-1]
        scales = [self.weight_scales[i] for i in layers]
        return FlowArgs(weights, biases, prefixes, panels, schedules, permutations, self.activation, maps, scales)

    def decoded(self, dtype: torch.dtype) -> FlowArgs:
        """Returns the same blocks with their weights ``float8.decoded``."""
        if not any([weight.dtype == BYTE for weight in self.weights]):
            return self
        pairs = zip(self.weights, self.weight_scales, strict=True)
        return self._replace(weights=[decoded(weight, scale, dtype) for weight, scale in pairs])


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
    "Tensor[] weights, Tensor[] biases, Tensor[] prefixes, Tensor[] panels, Tensor[] schedules,"
    " Tensor[] permutations, str activation, float[] maps, float[] weight_scales"
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
    for block in blocks:
        block.map.check()
    device = blocks[0].biases[0].device

    def empty() -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=device)

    # The same one at every call: what backends keep of arguments goes by their identity.
    recorded = torch.compiler.is_compiling()
    none = empty() if recorded else cached(blocks[0].schedule, ("no permutation", device), empty)
    return FlowArgs(
        [weight.contiguous() for block in blocks for weight in block.weights],
        [bias.contiguous() for block in blocks for bias in block.biases],
        [prefix for block in blocks for prefix in block.prefixes],
        [panels for block in blocks for panels in block.panels],
        [block.schedule for block in blocks],
        [none if permutation is None else permutation for permutation in permutations],
        activation,
        [float(number) for block in blocks for number in block.map],
        [scale for block in blocks for scale in block.weight_scales or [1.0] * len(block.weights)],
    )
