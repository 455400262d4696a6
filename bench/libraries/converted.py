"""Flows of fastmaf with the weights of another library, to compare the results of that library with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastmaf
from fastmaf.flows import interleave_permutations

LogScale = Callable[[Tensor], Tensor]


class DenseBlock(NamedTuple):
    """A masked autoregressive block of another library.

    Columns of the first and rows of the last layer follow ``order``; the last layer has two rows per dimension: shift,
    then raw scale.
    """

    weights: Sequence[Tensor]  # dense [out, in] per layer, with any values where masked
    biases: Sequence[Tensor]
    degrees: Sequence[Tensor]  # [H] per hidden layer; a unit of degree 1 sees only the first dimension of the order
    order: Tensor  # the dimensions of the data in the order in which the block generates them
    first_activation: str = "relu"  # of the first hidden layer; the others use ReLU

    @torch.no_grad()
    def to_made(self) -> fastmaf.MADE:
        """Returns the network with packed weights, whose hidden units are sorted by degree."""
        degrees = [d.cpu() for d in self.degrees]
        features = self.order.numel()
        made = fastmaf.MADE(features, [d.numel() for d in degrees], degrees=degrees, init="empty")
        made.layers[0].activation = self.first_activation
        columns = torch.arange(features)
        sorted_rows = [*(d.argsort(stable=True) for d in degrees), torch.arange(2 * features)]
        for layer, rows, weight, bias in zip(made.layers, sorted_rows, self.weights, self.biases, strict=True):
            layer.load_dense_(weight.detach().cpu()[rows][:, columns], bias.detach().cpu()[rows])
            columns = rows
        return made


class MultiplyAdd(fastmaf.Transform):
    """``z[d] = s[d] x[d] + t[d]``, the form of nflows, normflows, zuko and flowjax; fastmaf's block subtracts first.

    ``made`` computes t and the raw scale, ``log_scale`` log s from the latter.
    """

    def __init__(self, made: fastmaf.MADE, log_scale: LogScale) -> None:
        super().__init__()
        self.features, self.made, self.log_scale = made.features, made, log_scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.made(x).unbind(-1)
        log_scale = self.log_scale(raw)
        return log_scale.exp() * x + shift, log_scale.sum(1)


class ConvertedFlow(fastmaf.Flow):
    """A flow whose z is in the order of dimensions of its last block, of ``MultiplyAdd`` or fastmaf's own blocks."""

    def __init__(self, blocks: Sequence[DenseBlock], log_scale: LogScale | None = None) -> None:
        networks = [block.to_made() for block in blocks]
        converted: list[fastmaf.Transform] = [
            MultiplyAdd(made, log_scale) if log_scale else fastmaf.AffineAutoregressive(made) for made in networks
        ]
        # Without the permutation that interleave_permutations appends to return to the order of x.
        transforms = interleave_permutations(converted, [block.order for block in blocks])
        super().__init__(converted[0].features, transforms[: 1 + transforms.index(converted[-1])])

    @property
    def last(self) -> torch.nn.Module:
        """The block next to the base."""
        return self.transforms[-1]


def degrees_of_masks(masks: Sequence[Tensor], outputs: Tensor) -> list[Tensor]:
    """Returns the least degrees of the hidden units that give some masks ``[out, in]``.

    A unit's degree is at least that of every unit it sees, and larger than that of every unit in the next layer that
    does not see it. Columns of the first mask and rows of ``outputs``, one per dimension, are in the order of
    generation.
    """
    places = torch.arange(outputs.shape[0], device=outputs.device)
    degrees = [torch.zeros(mask.shape[0], dtype=torch.int64, device=mask.device) for mask in masks]
    while True:
        before = list(degrees)
        for k, mask in enumerate(masks):
            # The dimension at place d has degree d + 1 as an input; as an output it sees degrees up to d.
            below = degrees[k - 1] if k else places + 1
            above, next_mask = (degrees[k + 1], masks[k + 1]) if k + 1 < len(masks) else (places, outputs)
            seen = torch.where(mask.bool(), below, 0).amax(1)
            degrees[k] = torch.maximum(seen, torch.where(next_mask.bool(), 0, above[:, None] + 1).amax(0))
        if all(map(torch.equal, before, degrees)):
            return degrees
