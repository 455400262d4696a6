"""The inverse of a block of any network and element-wise map, in plain torch, with its derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.flow.torch.network import Invert, Network
from fastmaf.kernels.flow.torch.solve import solve
from fastmaf.kernels.flow.torch.transposed_solve import TransposedSolve
from fastmaf.kernels.op import records_gradients
from fastmaf.kernels.padding import keep_zero

# Of z ``[N, D]`` and a network: x and ladj. It records no gradients.
Steps: TypeAlias = Callable[[Tensor, Network], tuple[Tensor, Tensor]]


def network_inverse(z: Tensor, network: Network, invert: Invert, steps: Steps | None = None) -> tuple[Tensor, Tensor]:
    """Inverts a block, exactly, one step per level; each weight is read once.

    It is differentiable in ``z`` and the tensors of the network. The backward pass takes a triangular solve, and
    nothing but x and z is kept for it. A backward pass that is differentiated, or batched, consists of torch's own
    operations.

    Args:
        z: ``[N, D]``.
        network: that gives the parameters of the map.
        invert: the inverse of the element-wise map. It has no parameters of its own.
        steps: computes the inverse; None for ``solve``, in plain torch.

    Returns:
        ``x`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dx/dz| in nats.
    """
    if composite.needed():
        return composite.network_inverse(z, network, invert)
    layers = [
        layer._replace(weight=layer.weight.contiguous(), bias=layer.bias.contiguous()) for layer in network.layers
    ]
    network = network._replace(layers=layers)
    keep_zero(*zip(*((layer.weight, layer.prefix, layer.panels) for layer in layers), strict=True))
    steps = steps or functools.partial(_solve, invert)
    if not records_gradients([z, *network.tensors]):
        return steps(z, network)
    result: tuple[Tensor, Tensor] = _Inverse.apply(network, invert, steps, z, *network.tensors)
    return result


def _solve(invert: Invert, z: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    return solve(z, network, invert)


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, network: Network, invert: Invert, steps: Steps, z: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, ladj = steps(z, network)
        ctx.save_for_backward(z, x, *tensors)
        ctx.network, ctx.invert = network, invert
        return x, ladj

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad_x: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
        z, x, *tensors = ctx.saved_tensors
        network, invert = ctx.network.with_tensors(tensors), ctx.invert
        if composite.needed_for((grad_x, grad_ladj)):
            grads = composite.gradients(
                lambda z, *tensors: composite.network_inverse(z, network.with_tensors(tensors), invert),
                (z, *tensors),
                (grad_x, grad_ladj),
            )
            return None, None, None, *grads
        block = TransposedSolve(x, network)
        by_z, by_out = _derivatives(z, block.out, grad_ladj, invert)
        grad = block.solve(grad_x, by_out[0], by_out[1])
        return None, None, None, torch.addcmul(by_z[1], by_z[0], grad), *_grads(ctx, block)


def _grads(ctx: Any, block: TransposedSolve) -> list[Tensor | None]:
    """Returns the gradients of the network's tensors."""
    needed, count = ctx.needs_input_grad[4:], len(ctx.network.layers)
    result: list[Tensor | None] = [None] * len(needed)
    if any(needed[: 2 * count]):
        weights, biases = zip(*block.grad_parameters(), strict=True)
        result[: 2 * count] = [*weights, *biases]
    if any(needed[2 * count :]):
        result[2 * count :] = block.grad_terms()
    return result


def _derivatives(
    z: Tensor, out: Tensor, grad_ladj: Tensor, invert: Invert
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Returns the derivatives by z, then those by the outputs: of x, and of log dx/dz times ``grad_ladj``."""
    with torch.enable_grad():
        z, out = z.detach().requires_grad_(), out.detach().requires_grad_()
        x, log_slopes = invert(z, out)
        above = torch.ones_like(x), grad_ladj[:, None].expand_as(log_slopes)
        pairs = [
            torch.autograd.grad(value, (z, out), of, retain_graph=True, materialize_grads=True)
            for value, of in zip((x, log_slopes), above, strict=True)
        ]
    by_z, by_out = zip(*pairs, strict=True)
    return by_z, by_out
