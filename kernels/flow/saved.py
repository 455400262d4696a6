"""The activations that a flow's forward pass saves, and the backward pass through its layers.

One 1-D tensor holds them, so that an op has one more result: for each block in turn x (of the first block, and where a
permutation stands before the block; else it is the z of the block before), its hidden layers, log_scale and z.

The C++ kernels keep each of these in tiles, ``[tile, unit, 16 samples]``, with zeros behind the last sample; all others
by sample, ``[N, unit]``, with room left at the end. The tensor's last number says which it is, ``TILES`` or
``BY_SAMPLE``: a backward pass may run on another backend than its forward pass. Tensors that are not on the CPU are
always by sample, and the number is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaf.kernels.affine_output.args import AffineBatch
from fastmaf.kernels.factored_grad import FactoredGrad, GradientSink
from fastmaf.kernels.flow.args import FlowArgs, FlowBatch
from fastmaf.kernels.masked_linear.args import LinearBatch


class Activations(NamedTuple):
    """The activations of one block, views ``[N, units]`` of a tensor that is laid out by sample."""

    x: Tensor
    hidden: list[Tensor]
    log_scale: Tensor
    z: Tensor


def _widths(args: FlowArgs) -> list[list[int]]:
    """Returns how many numbers of a sample each block saves: of x (0 where it is not saved), of its hidden layers, of
    log_scale and of z.
    """
    widths = []
    for b, (*hidden, output) in enumerate(args.layers_of_blocks()):
        features = args.biases[output].shape[0] // 2
        x = features if b == 0 or args.permutations[b].numel() else 0
        widths.append([x, *(args.biases[i].shape[0] for i in hidden), features, features])
    return widths


TILE = 16  # samples
BY_SAMPLE, TILES = 0.0, 1.0


def numel_of(units: int, n: int) -> int:
    """Returns how many numbers the tensor has for ``n`` samples with so many numbers each."""
    return -(-n // TILE) * TILE * units + 1


def saved_numel(args: FlowArgs, n: int) -> int:
    """Returns how many numbers are saved for a batch of ``n``."""
    return numel_of(sum(map(sum, _widths(args))), n)


def new_saved(x: Tensor, args: FlowArgs) -> Tensor:
    """Returns the tensor for a batch ``x``, to be filled by sample."""
    saved = x.new_empty(saved_numel(args, len(x)))
    if x.device.type == "cpu":
        saved[len(x) * sum(map(sum, _widths(args))) :] = BY_SAMPLE
    return saved


def relaid(args: FlowArgs, saved: Tensor, n: int, layout: float) -> Tensor:
    """Returns the same activations in tiles or by sample; itself where they are that already."""
    if saved.device.type != "cpu" or saved[-1].item() == layout:
        return saved
    result = torch.empty_like(saved)
    tiles, at_tile, at_sample = -(-n // TILE), 0, 0
    for width in (width for block in _widths(args) for width in block):
        tiled, rows = slice(at_tile, at_tile + tiles * TILE * width), slice(at_sample, at_sample + n * width)
        if layout == BY_SAMPLE:
            result[rows] = (
                saved[tiled].view(tiles, width, TILE).transpose(1, 2).reshape(tiles * TILE, width)[:n].reshape(-1)
            )
        else:
            padded = torch.nn.functional.pad(saved[rows].view(n, width), (0, 0, 0, tiles * TILE - n))
            result[tiled] = padded.view(tiles, TILE, width).transpose(1, 2).reshape(-1)
        at_tile, at_sample = tiled.stop, rows.stop
    result[-1] = layout
    return result


def activations(args: FlowArgs, saved: Tensor, n: int) -> list[Activations]:
    """Returns each block's activations, of a tensor by sample."""
    result: list[Activations] = []
    widths = _widths(args)
    numels = [n * width for block in widths for width in block]
    parts = iter(saved[: sum(numels)].split(numels))
    for block in widths:
        x, *hidden, log_scale, z = (next(parts).view(n, width) for width in block)
        result.append(Activations(x if block[0] else result[-1].z, hidden, log_scale, z))
    return result


def first_x(args: FlowArgs, saved: Tensor, n: int) -> Tensor:
    """Returns the flow's input ``[N, D]``, from before its first permutation."""
    return before_permutation(activations(args, relaid(args, saved, n, BY_SAMPLE), n)[0].x, args.permutations[0])


def backward(
    batch: FlowBatch, args: FlowArgs, need_grad_x: bool, sinks: Sequence[GradientSink | None] | None = None
) -> tuple[Tensor, list[Any], list[Tensor]]:
    """Runs the backward pass of a flow, layer by layer.

    Args:
        sinks: consume the gradients of the weights; of those without one, the gradient is formed if it is required.
            None: the gradients of all weights are formed.

    Returns:
        The gradients of ``x`` (``[0, D]`` when not needed), of the weights (None where none was formed) and of the
        biases.
    """
    grad_weights: list[Any] = [None] * len(args.weights)
    grad_biases = [bias.new_empty(0) for bias in args.biases]

    def take(layer: int, factored: FactoredGrad, need_inputs: bool) -> tuple[Tensor, ...]:
        sink = None if sinks is None else sinks[layer]
        if sink is not None:
            return sink.take(factored, need_inputs)
        if sinks is None or args.weights[layer].requires_grad:
            grad_weights[layer] = factored.grad_weight()
        return factored.grad_inputs(need_inputs)

    grad = before_permutation(batch.grad_z, args.permutations[-1])
    for b, (*hidden, output), at in blocks_reversed(batch, args):
        needed = b > 0 or need_grad_x
        affine = AffineBatch(grad, batch.grad_ladj, torch.zeros_like(grad), at.hidden[-1], at.z, at.log_scale, at.x)
        factored = FactoredGrad("affine_output", affine, args.output(b, output))
        grad_h, grad_biases[output], direct = take(output, factored, True)
        for k in reversed(range(len(hidden))):
            linear = LinearBatch(grad_h, at.hidden[k - 1] if k else at.x, at.hidden[k])
            factored = FactoredGrad("masked_linear", linear, args.hidden(hidden[k]))
            grad_h, grad_biases[hidden[k]] = take(hidden[k], factored, needed or k > 0)
        if needed:
            grad = before_permutation(direct + grad_h, args.permutations[b])
    return grad if need_grad_x else grad.new_empty(0, grad.shape[1]), grad_weights, grad_biases


def blocks_reversed(batch: FlowBatch, args: FlowArgs) -> Iterator[tuple[int, range, Activations]]:
    """Yields each block's number, the numbers of its layers, and its activations; the last block first."""
    n = len(batch.grad_z)
    saved = relaid(args, batch.saved, n, BY_SAMPLE)
    blocks = zip(args.layers_of_blocks(), activations(args, saved, n), strict=True)
    for b, (layers, at) in reversed(list(enumerate(blocks))):
        yield b, layers, at


def before_permutation(grad: Tensor, permutation: Tensor) -> Tensor:
    """Returns the gradient before ``x[:, permutation]``, given the one after it."""
    if not permutation.numel():
        return grad.contiguous()
    return torch.empty_like(grad, memory_format=torch.contiguous_format).index_copy_(1, permutation, grad)
