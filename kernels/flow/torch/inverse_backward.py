"""Gradients through the inverse of flows of affine blocks, by implicit differentiation.

A block maps x to z = f(x, θ) with log-determinant ℓ(x, θ); its inverse gives x and -ℓ. The gradients are those that
the forward pass at x has for grad_z = -w and grad_ladj = -g_ladj, where w = J⁻ᵀ (g_x - g_ladj ℓ_x), with J = df/dx, is
the gradient of z: see ``transposed_solve.py``, with g[d] = w[d] s[d]. Of the two rows (m, u) of the output layer for d,
with s = exp(-a) or exp(a) the slope of the element-wise map (``AffineMap``), the gradients are

    z = (x - m) exp(-a):   grad_m = g             grad_u = (g (x - m) + g_ladj) da/du            SHIFT_FIRST
    z = exp(a) x + m:      grad_m = -g exp(-a)    grad_u = -(g x + g_ladj) da/du                 SCALE_FIRST
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaf.kernels.affine_output.affine_map import SHIFT_FIRST, AffineMap
from fastmaf.kernels.flow.args import FlowArgs
from fastmaf.kernels.flow.saved import before_permutation
from fastmaf.kernels.flow.torch.network import Network
from fastmaf.kernels.flow.torch.transposed_solve import TransposedSolve


def inverse_backward(
    grad_x: Tensor, grad_ladj: Tensor, x: Tensor, args: FlowArgs, need_parameters: bool
) -> list[Tensor]:
    """Returns the gradients of ``z``, and if needed of each packed weight (zero in the padding) and of each bias.

    Args:
        grad_x, grad_ladj: ``[N, D]`` and ``[N]``, the gradients of what the inverse returned.
        x: ``[N, D]``, what it returned.
        args: the blocks in the order of inversion.
        need_parameters: whether more than the gradient of ``z`` is wanted.
    """
    grad_weights, grad_biases = list(args.weights), list(args.biases)
    grad, x = (before_permutation(t, args.permutations[-1]) for t in (grad_x, x))
    for b, layers in reversed(list(enumerate(args.layers_of_blocks()))):
        activations = [args.activation] * (len(layers) - 1)
        network = Network([args.hidden(i) for i in layers], args.schedules[b], activations)
        block = TransposedSolve(x, network)
        grad, z = _solve(block, grad, grad_ladj, x, args.map(b))
        grad = before_permutation(grad, args.permutations[b])
        if need_parameters:
            for i, (grad_weight, grad_bias) in zip(layers, block.grad_parameters(), strict=True):
                grad_weights[i], grad_biases[i] = grad_weight, grad_bias
        if b:  # its z is what the inverse of the block before it returned
            x = before_permutation(z, args.permutations[b])
    return [grad, *grad_weights, *grad_biases] if need_parameters else [grad]


def _solve(
    block: TransposedSolve, grad_x: Tensor, grad_ladj: Tensor, x: Tensor, affine_map: AffineMap
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of ``z``, and ``z``."""
    shift, raw = block.out.unbind(2)
    log_scale = affine_map.log_scale(raw)
    slope, scale = affine_map.slope(log_scale), torch.exp(-affine_map.sign * log_scale)
    by_shift, by_raw = (torch.ones_like(x), x - shift) if affine_map.form == SHIFT_FIRST else (-scale, -x)
    of_x = torch.stack([by_shift, slope * by_raw], 2)
    of_raw = slope * (-affine_map.sign * grad_ladj[:, None])
    grad = block.solve(grad_x, of_x, torch.stack([torch.zeros_like(of_raw), of_raw], 2))
    return grad * scale, affine_map.forward(x, shift, log_scale)
