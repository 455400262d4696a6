"""Blocks in a row by the Triton kernels of their layers; the same functions as ``reference.py``.

No kernel of its own: on a GPU calls follow each other without waiting, and what a kernel needs of the one before it
passes through the second-level cache. What is saved is memory: layers write straight into what is kept for the way
back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaf.kernels.affine_output import triton_kernel as affine
from fastmaf.kernels.block import Chain
from fastmaf.kernels.chain import kept as way
from fastmaf.kernels.factors import Update
from fastmaf.kernels.masked_linear import triton_kernel as linear
from fastmaf.kernels.masked_linear.triton_backward import adam_steps, products, sum_slots
from fastmaf.kernels.triton_parts import why_not

__all__ = ["UPDATES_BIASES", "adam_", "backward", "forward", "why_not"]

UPDATES_BIASES = True


def forward(x: Tensor, chain: Chain, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z``, ``ladj`` and what ``backward`` needs if ``keep``; weights may be bfloat16 beside float32 ``x``."""
    n = x.shape[0]
    kept = x.new_empty(way.kept_numel(chain, n) if keep else 0)
    places = way.activations(chain, kept, n) if keep else _rotating(x, chain)
    features = x.shape[1]
    count = affine.shares_of(x, features)
    shares = x.new_empty(count * len(places), n, dtype=torch.float64)
    for b, (layers, at) in enumerate(zip(chain.layers_of_blocks(), places, strict=True)):
        permutation = chain.permutations[b]
        if permutation.numel():
            x = torch.index_select(x, 1, permutation, out=at.x)
        elif keep and b == 0:
            x = at.x.copy_(x)
        h = x
        for i, hidden in zip(layers[:-1], at.hidden, strict=True):
            weight, bias, _, tiles = chain.layer(i)
            h = linear.forward_into(hidden, h, weight, bias, tiles, chain.activation)
        weight, bias, _, tiles = chain.layer(layers[-1])
        of_block = shares[b * count : (b + 1) * count]
        options = chain.bounds[b], chain.softs[b]
        affine.forward_into(at.z, at.log_scale, of_block, h, weight, bias, x, tiles, *options)
        x = at.z
    last = chain.permutations[-1]
    return (x[:, last] if last.numel() else x.clone() if keep else x), affine.ladj_of(shares), kept


def _rotating(x: Tensor, chain: Chain) -> list[way.Activations]:
    """Returns room for each block's activations that the next but one may write over."""
    log_scale = torch.empty_like(x)
    permuted = torch.empty_like(x) if any(p.numel() for p in chain.permutations[:-1]) else x
    z = [torch.empty_like(x) for _ in chain.schedules[:2]]
    hidden: dict[tuple[int, int], Tensor] = {}
    places = []
    for b, layers in enumerate(chain.layers_of_blocks()):
        own = []
        for k, i in enumerate(layers[:-1]):
            width = chain.biases[i].shape[0]
            if (k, width) not in hidden:
                hidden[k, width] = x.new_empty(x.shape[0], width)
            own.append(hidden[k, width])
        places.append(way.Activations(permuted, own, log_scale, z[b % 2]))
    return places


def backward(
    grad_z: Tensor, grad_ladj: Tensor, kept: Tensor, chain: Chain, need_grad_x: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns the gradients of ``x`` (``[0, D]`` when not needed), the packed weights and the biases."""
    grad_weights = [torch.empty_like(weight, dtype=grad_z.dtype) for weight in chain.weights]

    def of_layer(layer: int, g: Tensor, below: Tensor, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
        weight, _, prefix, tiles = chain.layer(layer)
        return products(
            g, below, weight, prefix, tiles, need_x=need_x, mode="store", grad_w=grad_weights[layer]
        )  # fmt: skip

    grad_x, grad_biases = _way_back(grad_z, grad_ladj, kept, chain, need_grad_x, of_layer)
    return grad_x, grad_weights, grad_biases


def adam_(
    grad_z: Tensor,
    grad_ladj: Tensor,
    kept: Tensor,
    chain: Chain,
    need_grad_x: bool,
    updates: Sequence[Update],
    bias_updates: Sequence[Update] | None,
) -> tuple[Tensor, list[Tensor]]:
    """Takes a step of Adam on every weight, in place, and on every bias if ``bias_updates``.

    Returns the gradients of ``x`` and of the biases (empty where they are updated).
    """
    steps = adam_steps((*updates, *(bias_updates or ())), grad_z.device)

    def of_layer(layer: int, g: Tensor, below: Tensor, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, prefix, tiles = chain.layer(layer)
        of_bias: dict[str, Any] = {"bias": bias, "bias_step": steps[len(updates) + layer]} if bias_updates else {}
        return products(
            g, below, weight, prefix, tiles, need_x=need_x, mode="adam", step=steps[layer], **of_bias
        )  # fmt: skip

    return _way_back(grad_z, grad_ladj, kept, chain, need_grad_x, of_layer)


# Of a layer: what ``products`` returns, given the gradient of its product and the values below it.
_OfLayer = Callable[[int, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]


def _way_back(
    grad_z: Tensor, grad_ladj: Tensor, kept: Tensor, chain: Chain, need_grad_x: bool, of_layer: _OfLayer
) -> tuple[Tensor, list[Tensor]]:
    grad_biases = [bias.new_empty(0) for bias in chain.biases]
    grad, grad_ladj = way.through(grad_z, chain.permutations[-1]), grad_ladj.contiguous()
    blocks = list(zip(chain.layers_of_blocks(), way.activations(chain, kept, grad_z.shape[0]), strict=True))
    for b, (layers, at) in reversed(list(enumerate(blocks))):
        wanted = b > 0 or need_grad_x
        g, direct = affine.grad_out(grad, grad_ladj, None, at.z, at.log_scale, chain.bounds[b], chain.softs[b])
        for k, below in reversed(list(enumerate((at.x, *at.hidden)))):
            partial, counts, grad_biases[layers[k]] = of_layer(layers[k], g, below, k > 0 or wanted)
            if k > 0:
                act = below if chain.activation == "relu" else None
                g = sum_slots(torch.empty_like(below), partial, counts, act=act)
            elif wanted:
                grad = sum_slots(torch.empty_like(below), partial, counts, add=direct)
        if wanted:
            grad = way.through(grad, chain.permutations[b])
    return grad if need_grad_x else grad.new_empty(0, grad.shape[1]), grad_biases
