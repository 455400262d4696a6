"""A flow's forward and backward pass by the Triton kernels of its layers.

There is no kernel of a whole flow: on a GPU launches follow each other without waiting, and a kernel reads what the one
before it has written from the second-level cache. Layers write straight into the saved activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.affine_output import triton as affine
from fastmaf.kernels.affine_output.args import AffineBatch
from fastmaf.kernels.flow.args import FlowArgs, FlowBatch
from fastmaf.kernels.flow.saved import Activations, activations, before_permutation, blocks_reversed, new_saved
from fastmaf.kernels.masked_linear import triton as linear
from fastmaf.kernels.masked_linear.triton_backward import adam_steps, products
from fastmaf.kernels.triton_common.partial_sums import sum_slots

UPDATES_BIASES = True  # adam_ takes steps on the biases as well


def forward(x: Tensor, args: FlowArgs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z``, ``ladj`` and what ``backward`` needs if ``save``; weights may be bfloat16 beside float32 ``x``."""
    n = x.shape[0]
    saved = new_saved(x, args) if save else x.new_empty(0)
    places = activations(args, saved, n) if save else _rotating(x, args)
    features = x.shape[1]
    count = affine.shares_of(x, features)
    shares = x.new_empty(count * len(places), n, dtype=torch.float64)
    for b, (layers, at) in enumerate(zip(args.layers_of_blocks(), places, strict=True)):
        if args.permutations[b].numel():
            x = torch.index_select(x, 1, args.permutations[b], out=at.x)
        elif save and b == 0:
            x = at.x.copy_(x)
        h = x
        for i, hidden in zip(layers[:-1], at.hidden, strict=True):
            h = linear.forward_into(hidden, h, args.hidden(i))
        of_block = shares[b * count : (b + 1) * count]
        affine.forward_into(at.z, at.log_scale, of_block, h, x, args.output(b, layers[-1]))
        x = at.z
    last = args.permutations[-1]
    return (x[:, last] if last.numel() else x.clone() if save else x), affine.ladj_of(shares), saved


def _rotating(x: Tensor, args: FlowArgs) -> list[Activations]:
    """Returns room for each block's activations that the next but one may write over."""
    log_scale = torch.empty_like(x)
    permuted = torch.empty_like(x) if any(p.numel() for p in args.permutations[:-1]) else x
    z = [torch.empty_like(x) for _ in args.schedules[:2]]
    hidden: dict[tuple[int, int], Tensor] = {}
    places = []
    for b, layers in enumerate(args.layers_of_blocks()):
        own = []
        for k, i in enumerate(layers[:-1]):
            width = args.biases[i].shape[0]
            if (k, width) not in hidden:
                hidden[k, width] = x.new_empty(x.shape[0], width)
            own.append(hidden[k, width])
        places.append(Activations(permuted, own, log_scale, z[b % 2]))
    return places


def backward(batch: FlowBatch, args: FlowArgs, need_grad_x: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns the gradients of ``x`` (``[0, D]`` when not needed), the packed weights and the biases."""
    grad_weights = [torch.empty_like(weight, dtype=batch.grad_z.dtype) for weight in args.weights]

    def of_layer(layer: int, g: Tensor, below: Tensor, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
        return products(g, below, args.hidden(layer), need_x=need_x, mode="store", grad_w=grad_weights[layer])

    grad_x, grad_biases = _backward(batch, args, need_grad_x, of_layer)
    return grad_x, grad_weights, grad_biases


def adam_(
    batch: FlowBatch,
    args: FlowArgs,
    need_grad_x: bool,
    updates: Sequence[Update],
    bias_updates: Sequence[Update] | None,
) -> tuple[Tensor, list[Tensor]]:
    """Takes a step of Adam on every weight, in place, and on every bias if ``bias_updates``.

    Returns the gradients of ``x`` and of the biases (empty where they are updated).
    """
    steps = adam_steps((*updates, *(bias_updates or ())), batch.grad_z.device)

    def of_layer(layer: int, g: Tensor, below: Tensor, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
        of_bias: dict[str, Any] = {"bias_step": steps[len(updates) + layer]} if bias_updates else {}
        return products(g, below, args.hidden(layer), need_x=need_x, mode="adam", step=steps[layer], **of_bias)

    return _backward(batch, args, need_grad_x, of_layer)


# Of a layer: returns the results of ``products``, given the gradient of its product and its input.
_OfLayer = Callable[[int, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]


def _backward(batch: FlowBatch, args: FlowArgs, need_grad_x: bool, of_layer: _OfLayer) -> tuple[Tensor, list[Tensor]]:
    grad_biases = [bias.new_empty(0) for bias in args.biases]
    grad, grad_ladj = before_permutation(batch.grad_z, args.permutations[-1]), batch.grad_ladj.contiguous()
    for b, layers, at in blocks_reversed(batch, args):
        needed = b > 0 or need_grad_x
        of_affine = AffineBatch(grad, grad_ladj, None, at.hidden[-1], at.z, at.log_scale, at.x)  # type: ignore[arg-type]
        g, direct = affine.grad_product(of_affine, args.output(b, layers[-1]))
        for k, below in reversed(list(enumerate((at.x, *at.hidden)))):
            partial, counts, grad_biases[layers[k]] = of_layer(layers[k], g, below, k > 0 or needed)
            if k > 0:
                act = below if args.activation == "relu" else None
                g = sum_slots(torch.empty_like(below), partial, counts, act=act)
            elif needed:
                grad = sum_slots(torch.empty_like(below), partial, counts, add=direct)
        if needed:
            grad = before_permutation(grad, args.permutations[b])
    return grad if need_grad_x else grad.new_empty(0, grad.shape[1]), grad_biases
