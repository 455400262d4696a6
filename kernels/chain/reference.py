"""Blocks in a row by the ops of their layers, each on the backend that serves it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmaf.kernels.backends import implementation
from fastmaf.kernels.block import Chain
from fastmaf.kernels.chain import kept as way
from fastmaf.kernels.factors import Factors, Update

# Whether adam_ takes steps on the biases as well. A few small tensors: here torch's optimiser does as well.
UPDATES_BIASES = False


def forward(x: Tensor, chain: Chain, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z`` ``[N, D]``, ``ladj`` ``[N]`` = log |det dz/dx|, and what ``backward`` needs if ``keep``."""
    linear, affine = implementation("masked_linear", x), implementation("affine_output", x)
    n, ladj = x.shape[0], x.new_zeros(x.shape[0])
    kept = x.new_empty(way.kept_numel(chain, n) if keep else 0)
    places = way.activations(chain, kept, n) if keep else None
    for b, layers in enumerate(chain.layers_of_blocks()):
        permutation = chain.permutations[b]
        x = x[:, permutation] if permutation.numel() else x
        h, hidden = x, []
        for i in layers[:-1]:
            h = linear.forward(h, *chain.layer(i), chain.activation)
            hidden.append(h)
        weight, bias, prefix, tiles = chain.layer(layers[-1])
        z, term, log_scale = affine.forward(h, weight, bias, x, prefix, tiles, chain.bounds[b], chain.softs[b])
        ladj = ladj + term
        if places is not None:
            for to, value in zip(
                (places[b].x, *places[b].hidden, *places[b][2:]), (x, *hidden, log_scale, z), strict=True
            ):
                to.copy_(value)
        x = z
    last = chain.permutations[-1]
    return (x[:, last] if last.numel() else x), ladj, kept


def backward(
    grad_z: Tensor, grad_ladj: Tensor, kept: Tensor, chain: Chain, need_grad_x: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns the gradients of ``x`` (``[0, D]`` when not needed), the packed weights and the biases."""
    grad_weights = [weight.new_empty(0) for weight in chain.weights]

    def step(layer: int, factors: Factors, need_inputs: bool) -> tuple[Tensor, ...]:
        grad_weights[layer] = factors.grad_weight()
        return factors.grad_inputs(need_inputs)

    grad_x, grad_biases = way.backward(grad_z, grad_ladj, kept, chain, need_grad_x, step)
    return grad_x, grad_weights, grad_biases


def adam_(
    grad_z: Tensor,
    grad_ladj: Tensor,
    kept: Tensor,
    chain: Chain,
    need_grad_x: bool,
    updates: Sequence[Update],
    bias_updates: None,
) -> tuple[Tensor, list[Tensor]]:
    """Takes a step of Adam on every weight, in place; returns the gradients of ``x`` and of the biases."""

    def step(layer: int, factors: Factors, need_inputs: bool) -> tuple[Tensor, ...]:
        return factors.adam_(updates[layer], need_inputs=need_inputs)

    return way.backward(grad_z, grad_ladj, kept, chain, need_grad_x, step)
