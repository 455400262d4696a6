"""The ops as functional PyTorch over the same packed panels, for derivatives that the ops themselves do not have.

An op has a first derivative in reverse mode. ``torch.func`` transforms, forward-mode AD, double backward and batched
gradients need one that consists of PyTorch's own operations, none of them in place and none that reads a value. The
functions here do, with the arguments of the ops; ``needed`` returns whether an op must call them. They are slower, and
save more for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastmaf.kernels.activations import ACTIVATIONS
from fastmaf.kernels.affine_output.args import AffineArgs
from fastmaf.kernels.autocast import matmul
from fastmaf.kernels.float8 import decode
from fastmaf.kernels.flow.args import FlowArgs, permuted
from fastmaf.kernels.flow.torch.network import Invert, Network
from fastmaf.kernels.flow.torch.plan import plan_of
from fastmaf.kernels.layout import runs_of
from fastmaf.kernels.masked_linear.args import LinearArgs
from fastmaf.kernels.padding import without_padding

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def needed() -> bool:
    """Returns whether a ``torch.func`` transform or a level of forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needed_for(grads: Sequence[Tensor | None]) -> bool:
    """Returns whether a backward formula must call ``gradients``: its results are differentiated, or ``grads`` are
    batched (``torch.autograd.grad(..., is_grads_batched=True)``).
    """
    batched = any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)
    return batched or torch.is_grad_enabled() or needed()


def masked_linear(x: Tensor, args: LinearArgs) -> Tensor:
    """Returns ``y`` ``[N, out]``."""
    weight = without_padding(decode(args.weight, args.weight_scale, x.dtype), args.prefix, args.panels)
    parts = [
        matmul(x[:, : run.width], run.of(weight).transpose(0, 1).flatten(1))[:, : rows.stop - rows.start]
        for run in runs_of(args.panels)
        for rows in (run.rows(args.bias.shape[0]),)
    ]
    return _activated(torch.cat(parts, dim=1) + args.bias, args.activation)


def affine_output(h: Tensor, x: Tensor, args: AffineArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z`` ``[N, D]``, ``ladj`` ``[N]`` and ``log_scale`` ``[N, D]``."""
    affine_map = args.affine_map
    shift, raw = masked_linear(h, args.linear).unflatten(1, (-1, 2)).unbind(2)
    log_scale = affine_map.log_scale(raw)
    return affine_map.forward(x, shift, log_scale), affine_map.sign * log_scale.sum(1), log_scale


def flow_forward(x: Tensor, args: FlowArgs) -> tuple[Tensor, Tensor]:
    """Returns ``z`` ``[N, D]`` and ``ladj`` ``[N]``."""
    ladj = x.new_zeros(x.shape[0])
    for b, (*hidden, output) in enumerate(args.layers_of_blocks()):
        x = h = permuted(x, args.permutations[b])
        for k in hidden:
            h = masked_linear(h, args.hidden(k))
        x, term, _ = affine_output(h, x, args.output(b, output))
        ladj = ladj + term
    return permuted(x, args.permutations[-1]), ladj


def flow_log_density(x: Tensor, args: FlowArgs) -> tuple[Tensor]:
    """Returns the log-density ``[N]`` of x where the density of z is the standard normal one."""
    z, ladj = flow_forward(x, args)
    return (ladj - 0.5 * z.square().sum(1) - z.shape[1] * HALF_LOG_2PI,)


def flow_inverse(z: Tensor, args: FlowArgs) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]``; the blocks are in the order of inversion."""
    ladj = z.new_zeros(z.shape[0])
    for b, layers in enumerate(args.layers_of_blocks()):
        z, term = _inverse_of_block(permuted(z, args.permutations[b]), args, b, layers)
        ladj = ladj + term
    return permuted(z, args.permutations[-1]), ladj


def _inverse_of_block(z: Tensor, args: FlowArgs, block: int, layers: range) -> tuple[Tensor, Tensor]:
    affine_map = args.map(block)

    def invert(z: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = out.unbind(-1)
        log_scale = affine_map.log_scale(raw)
        return affine_map.inverse(z, shift, log_scale), -affine_map.sign * log_scale

    activations = [args.activation] * (len(layers) - 1)
    return network_inverse(z, Network([args.hidden(i) for i in layers], args.schedules[block], activations), invert)


def network_inverse(z: Tensor, network: Network, invert: Invert) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]`` of a block of any network and element-wise map."""
    layers, terms = network.layers, network.terms
    weights = [decode(layer.weight, layer.weight_scale, z.dtype) for layer in layers]
    weights = [without_padding(weight, of.prefix, of.panels) for weight, of in zip(weights, layers, strict=True)]
    outputs = len(layers[-1].bias) // z.shape[1]
    ladj, known = z.new_zeros(z.shape[0]), z[:, :0]
    finished = [known for _ in weights]  # of x, then of each hidden layer's units
    for plan in plan_of([layer.panels for layer in layers], network.schedule, outputs):
        # Split and not sliced step by step: the gradient of each slice would be as large as the rows of a group.
        pieces = []
        for k, (of, weight) in enumerate(zip(plan, weights, strict=True)):
            bias = layers[k].bias[of.rows]
            bias = bias + terms[k][:, of.rows] if terms else bias
            pieces.append(zip(of.matrix(weight, slice(None)).split(of.counts), bias.split(of.counts, -1), strict=True))
        for *hidden, output in zip(*pieces, strict=True):
            out, start = _product(finished[-1], *output).unflatten(1, (-1, outputs)), finished[0].shape[1]
            x, term = invert(z[:, start : start + out.shape[1]], out)
            finished[0] = torch.cat((finished[0], x), dim=1)
            ladj = ladj + term.sum(1)
            sums: list[Tensor] = []
            for k, piece in enumerate(hidden):
                own = _product(finished[k], *piece)
                sums.append(own + sums[k - 2] if network.adds_before(k) else own)
                units = ACTIVATIONS[network.activations[k]](sums[k])
                finished[k + 1] = torch.cat((finished[k + 1], units), dim=1)
    return finished[0], ladj


def gradients(
    function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns the gradients of those of ``tensors`` that require one, for a backward formula of an op.

    They can be differentiated in turn, and batched.

    Args:
        function: computes the op's results from ``tensors`` by the functions of this module.
        tensors: the op's differentiable arguments.
        grads: the gradients of its results; None for zero.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one tensor may have been computed from another, which is not this op's derivative.
        aliases = [tensor.view_as(tensor) if tensor.requires_grad else tensor for tensor in tensors]
        results = function(*aliases)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        wanted = [alias for alias in aliases if alias.requires_grad]
        outputs, above = zip(*pairs, strict=True)
        values = iter(torch.autograd.grad(outputs, wanted, above, create_graph=differentiable, materialize_grads=True))
    return [next(values) if tensor.requires_grad else None for tensor in tensors]


def flow_gradients(
    function: Callable[[Tensor, FlowArgs], Sequence[Tensor]], x: Tensor, args: FlowArgs, grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns ``gradients`` of ``x`` and of ``args.parameters``, for a function of this module."""
    return gradients(lambda x, *tensors: function(x, args.with_parameters(tensors)), (x, *args.parameters), grads)


def _product(below: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns the sums of some rows over the first units below, as many as are finished."""
    return matmul(below[:, : weight.shape[1]], weight[:, : below.shape[1]].mT) + bias


def _activated(y: Tensor, activation: str) -> Tensor:
    return torch.relu(y) if activation == "relu" else y
