"""The activations that a flow's forward pass saves, and the backward pass through its layers.

One 1-D tensor holds them, so that an op has one more result: for each block in turn x ``[N, D]`` (of the first
block, and where a permutation stands before the block; else it is the z of the block before), its hidden layers
``[N, H]``, log_scale and z ``[N, D]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.affine_output.args import AffineBatch
from fastmaf.kernels.factored_grad import FactoredGrad
from fastmaf.kernels.flow.args import FlowArgs
from fastmaf.kernels.masked_linear.args import LinearBatch


class Activations(NamedTuple):
    """The activations of one block, views ``[N, units]`` of the saved tensor."""

    x: Tensor
    hidden: list[Tensor]
    log_scale: Tensor
    z: Tensor


def _has_own_x(args: FlowArgs, block: int) -> bool:
    return block == 0 or args.permutations[block].numel() > 0


def saved_numel(args: FlowArgs, n: int) -> int:
    """Returns how many numbers are saved for a batch of ``n``."""
    total = 0
    for b, layers in enumerate(args.layers_of_blocks()):
        features = args.biases[layers[-1]].shape[0] // 2
        total += (3 if _has_own_x(args, b) else 2) * features + sum(args.biases[i].shape[0] for i in layers[:-1])
    return n * total


def activations(args: FlowArgs, saved: Tensor, n: int) -> list[Activations]:
    """Returns each block's activations."""
    result: list[Activations] = []
    start = 0

    def take(units: int) -> Tensor:
        nonlocal start
        start += n * units
        return saved[start - n * units : start].view(n, units)

    for b, layers in enumerate(args.layers_of_blocks()):
        features = args.biases[layers[-1]].shape[0] // 2
        x = take(features) if _has_own_x(args, b) else result[-1].z
        hidden = [take(args.biases[i].shape[0]) for i in layers[:-1]]
        result.append(Activations(x, hidden, take(features), take(features)))
    return result


def first_x(args: FlowArgs, saved: Tensor, n: int) -> Tensor:
    """Returns the flow's input ``[N, D]``, from before its first permutation."""
    return before_permutation(activations(args, saved, n)[0].x, args.permutations[0])


# Of one layer: returns the gradients of its inputs and bias as FactoredGrad.grad_inputs does, and consumes the weight
# gradient (stores, applies or discards it).
Step = Callable[[int, FactoredGrad, bool], tuple[Tensor, ...]]


def backward(
    grad_z: Tensor, grad_ladj: Tensor, saved: Tensor, args: FlowArgs, need_grad_x: bool, step: Step
) -> tuple[Tensor, list[Tensor]]:
    """Runs the backward pass of a flow, layer by layer.

    Args:
        step: called with the number of a layer, the gradient of its weight in factored form, and whether its inputs'
            gradients are needed.

    Returns:
        The gradients of ``x`` (``[0, D]`` when not needed) and of the biases.
    """
    grad_biases = [bias.new_empty(0) for bias in args.biases]
    blocks = list(zip(args.layers_of_blocks(), activations(args, saved, grad_z.shape[0]), strict=True))
    grad = before_permutation(grad_z, args.permutations[-1])
    for b, (layers, at) in reversed(list(enumerate(blocks))):
        needed = b > 0 or need_grad_x
        *hidden, output = layers
        batch = AffineBatch(grad, grad_ladj, torch.zeros_like(grad), at.hidden[-1], at.z, at.log_scale)
        factored = FactoredGrad("affine_output", batch, args.output(b, output))
        grad_h, grad_biases[output], direct = step(output, factored, True)
        for k in reversed(range(len(hidden))):
            linear = LinearBatch(grad_h, at.hidden[k - 1] if k else at.x, at.hidden[k])
            factored = FactoredGrad("masked_linear", linear, args.hidden(hidden[k]))
            grad_h, grad_biases[hidden[k]] = step(hidden[k], factored, needed or k > 0)
        if needed:
            grad = before_permutation(direct + grad_h, args.permutations[b])
    return grad if need_grad_x else grad.new_empty(0, grad.shape[1]), grad_biases


def before_permutation(grad: Tensor, permutation: Tensor) -> Tensor:
    """Returns the gradient before ``x[:, permutation]``, given the one after it."""
    if not permutation.numel():
        return grad.contiguous()
    return torch.empty_like(grad, memory_format=torch.contiguous_format).index_copy_(1, permutation, grad)
