"""Flows of fastmaf with the weights of another library, to compare the results of that library with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastmaf
from fastmaf.flows import interleave_permutations

LogScale = Callable[[Tensor], Tensor]


class DenseBlock(NamedTuple):
    """A masked autoregressive block of another library.

    Attributes:
        weights: dense ``[out, in]`` per layer, with any values where masked. Columns of the first and rows of the last
            layer follow ``order``; the last layer has two rows per dimension: shift, then raw scale.
        biases: ``[out]`` per layer.
        degrees: ``[H]`` per hidden layer; a unit of degree 1 sees only the first dimension of ``order``.
        order: the dimensions of the data in the order in which the block generates them.
        first_activation: of the first hidden layer; the others use ReLU.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    degrees: Sequence[Tensor]
    order: Tensor
    first_activation: str = "relu"


class MultiplyAdd(fastmaf.Transform):
    """``z[d] = s[d] x[d] + t[d]``, the form of nflows, normflows, zuko and flowjax; fastmaf's block subtracts first.

    Args:
        made: computes t and the raw scale.
        log_scale: computes log s from the raw scale.
    """

    def __init__(self, made: fastmaf.MADE, log_scale: LogScale) -> None:
        super().__init__()
        self.features, self.made, self.log_scale = made.features, made, log_scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.made(x).unbind(-1)
        log_scale = self.log_scale(raw)
        return log_scale.exp() * x + shift, log_scale.sum(1)


class ConvertedFlow(fastmaf.Flow):
    """A flow whose z is in the order of dimensions of its last block.

    Args:
        blocks: in the order in which x passes through them.
        log_scale: as for ``MultiplyAdd``; None for fastmaf's form of a block, with log-scales within ± ``bound``.
        bound: of fastmaf's form.
    """

    def __init__(
        self, blocks: Sequence[DenseBlock], log_scale: LogScale | None = None, bound: float | None = 5.0
    ) -> None:
        converted = [_block(block, log_scale, bound) for block in blocks]
        # Without the permutation that interleave_permutations appends to return to the order of x.
        transforms = interleave_permutations(converted, [block.order for block in blocks])
        super().__init__(converted[0].features, transforms[: 1 + transforms.index(converted[-1])])

    @property
    def last(self) -> nn.Module:
        """The block next to the base."""
        return self.transforms[-1]


@torch.no_grad()
def _block(block: DenseBlock, log_scale: LogScale | None, bound: float | None) -> fastmaf.Transform:
    features, hidden = block.order.numel(), [d.numel() for d in block.degrees]
    made = fastmaf.MADE(features, hidden, degrees=[d.cpu() for d in block.degrees], init="empty")
    made.layers[0].activation = block.first_activation
    places: list[Tensor | None] = [None, *(d.cpu().argsort(stable=True) for d in block.degrees), None]
    for k, layer in enumerate(made.layers):
        columns, rows = places[k], places[k + 1]
        weight, bias = block.weights[k].detach().cpu(), block.biases[k].detach().cpu()
        weight = weight if columns is None else weight[:, columns]
        if rows is not None:
            weight, bias = weight[rows], bias[rows]
        layer.load_dense_(weight, bias)
    if log_scale is None:
        return fastmaf.AffineAutoregressive(made, log_scale_bound=bound)
    return MultiplyAdd(made, log_scale)


def degrees_of_masks(masks: Sequence[Tensor], outputs: Tensor) -> list[Tensor]:
    """Returns degrees of the hidden units that give the masks ``[out, in]`` of the hidden layers and ``outputs``.

    A unit's degree is at least that of every unit it sees, and larger than that of every unit in the next layer that
    does not see it. The least such degrees may differ from those of the original, but the masks are the same.

    Args:
        masks: of the hidden layers; the columns of the first are in the order of generation.
        outputs: ``[D, H]`` of the last layer, one row per dimension in the order of generation.
    """
    places = torch.arange(outputs.shape[0], device=outputs.device)
    degrees = [torch.zeros(mask.shape[0], dtype=torch.int64, device=mask.device) for mask in masks]
    while True:
        before = [degree.clone() for degree in degrees]
        for k, mask in enumerate(masks):
            # The dimension at place d has degree d + 1 as an input; as an output it sees degrees up to d.
            below = degrees[k - 1] if k else places + 1
            above, next_mask = (degrees[k + 1], masks[k + 1]) if k + 1 < len(masks) else (places, outputs)
            seen = torch.where(mask.bool(), below, 0).amax(1)
            degrees[k] = torch.maximum(seen, torch.where(next_mask.bool(), 0, above[:, None] + 1).amax(0))
        if all(torch.equal(*pair) for pair in zip(before, degrees, strict=True)):
            return degrees
