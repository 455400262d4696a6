"""What the forward pass of a chain keeps for the backward pass, and the way back through the layers.

One 1-D tensor holds it, so that an op has one thing to return: for each block in turn x ``[N, D]`` (of the first block,
and where a permutation stands before the block; else it is the z of the block before), its hidden layers ``[N, H]``,
log_scale and z ``[N, D]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.block import Chain
from fastmaf.kernels.factors import Factors


class Activations(NamedTuple):
    """The activations of one block, views ``[N, units]`` of what was kept."""

    x: Tensor
    hidden: list[Tensor]
    log_scale: Tensor
    z: Tensor


def _has_own_x(chain: Chain, block: int) -> bool:
    return block == 0 or chain.permutations[block].numel() > 0


def kept_numel(chain: Chain, n: int) -> int:
    """Returns how many numbers are kept for a batch of ``n``."""
    total = 0
    for b, layers in enumerate(chain.layers_of_blocks()):
        features = chain.biases[layers[-1]].shape[0] // 2
        total += (3 if _has_own_x(chain, b) else 2) * features + sum(chain.biases[i].shape[0] for i in layers[:-1])
    return n * total


def activations(chain: Chain, kept: Tensor, n: int) -> list[Activations]:
    """Returns each block's activations."""
    result: list[Activations] = []
    start = 0

    def take(units: int) -> Tensor:
        nonlocal start
        start += n * units
        return kept[start - n * units : start].view(n, units)

    for b, layers in enumerate(chain.layers_of_blocks()):
        features = chain.biases[layers[-1]].shape[0] // 2
        x = take(features) if _has_own_x(chain, b) else result[-1].z
        hidden = [take(chain.biases[i].shape[0]) for i in layers[:-1]]
        result.append(Activations(x, hidden, take(features), take(features)))
    return result


def first_x(chain: Chain, kept: Tensor, n: int) -> Tensor:
    """Returns the chain's input ``[N, D]``, from before its first permutation."""
    return through(activations(chain, kept, n)[0].x, chain.permutations[0])


# Of one layer: returns the gradients of its inputs and bias as Factors.grad_inputs does, and makes what it will of its
# weight's.
Step = Callable[[int, Factors, bool], tuple[Tensor, ...]]


def backward(
    grad_z: Tensor, grad_ladj: Tensor, kept: Tensor, chain: Chain, need_grad_x: bool, step: Step
) -> tuple[Tensor, list[Tensor]]:
    """Goes back through the chain, layer by layer.

    Args:
        step: called with the number of a layer, the factors of its weight's gradient, and whether its inputs' are
            needed.

    Returns:
        The gradients of ``x`` (``[0, D]`` when not needed) and of the biases.
    """
    grad_biases = [bias.new_empty(0) for bias in chain.biases]
    blocks = list(zip(chain.layers_of_blocks(), activations(chain, kept, grad_z.shape[0]), strict=True))
    grad = through(grad_z, chain.permutations[-1])
    for b, (layers, at) in reversed(list(enumerate(blocks))):
        wanted = b > 0 or need_grad_x
        *hidden, output = layers
        batch: tuple[Tensor, ...]
        batch = grad, grad_ladj, torch.zeros_like(grad), at.hidden[-1], at.z, at.log_scale
        options = chain.bounds[b], chain.softs[b]
        grad_h, grad_biases[output], direct = step(
            output, _factors("affine_output", batch, chain, output, options), True
        )
        for k in reversed(range(len(hidden))):
            below = at.hidden[k - 1] if k else at.x
            factors = _factors("masked_linear", (grad_h, below, at.hidden[k]), chain, hidden[k], (chain.activation,))
            grad_h, grad_biases[hidden[k]] = step(hidden[k], factors, wanted or k > 0)
        if wanted:
            grad = through(direct + grad_h, chain.permutations[b])
    return grad if need_grad_x else grad.new_empty(0, grad.shape[1]), grad_biases


def _factors(op: str, batch: tuple[Tensor, ...], chain: Chain, layer: int, options: tuple[object, ...]) -> Factors:
    return Factors(op, batch, chain.weights[layer], chain.prefixes[layer], chain.tiles[layer], options)


def through(grad: Tensor, permutation: Tensor) -> Tensor:
    """Returns the gradient before ``x[:, permutation]``, given the one after it."""
    if not permutation.numel():
        return grad.contiguous()
    return torch.empty_like(grad, memory_format=torch.contiguous_format).index_copy_(1, permutation, grad)
