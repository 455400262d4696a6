"""The ops as functional PyTorch over the same packed tiles, for derivatives that the ops themselves do not have.

An op has a first derivative in reverse mode. ``torch.func`` transforms, forward-mode AD, double backward and batched
gradients need one that consists of PyTorch's own operations, none of them in place and none that reads a value. The
functions here are that, with the arguments of the ops; ``needed`` says when the ops have to call them. They are slower,
and keep more for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastmaf.kernels.affine_output.reference import bound_log_scale
from fastmaf.kernels.autocast import matmul
from fastmaf.kernels.layout import tiles_of
from fastmaf.kernels.level_inverse.reference import plan_of

if TYPE_CHECKING:
    from fastmaf.kernels.block import Chain


def needed() -> bool:
    """Says whether a ``torch.func`` transform or a level of forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needed_for(grads: Sequence[Tensor | None]) -> bool:
    """Says whether a backward formula has to call ``gradients``: what it returns is differentiated, or ``grads`` are
    batched (``torch.autograd.grad(..., is_grads_batched=True)``).
    """
    batched = any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)
    return batched or torch.is_grad_enabled() or needed()


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor, prefix: Tensor, tiles: Tensor, activation: str) -> Tensor:
    """Returns ``y`` ``[N, out]``."""
    parts, weight = [], _visible(weight.to(x.dtype), prefix, tiles)
    for start, stop, width, offset in tiles_of(tiles):
        rows = _matrix(weight, offset, stop - start, width)
        parts.append(matmul(x[:, :width], rows.mT) + bias[start:stop])
    return _activated(torch.cat(parts, dim=1), activation)


def affine_output(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, prefix: Tensor, tiles: Tensor, bound: float, soft: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z`` ``[N, D]``, ``ladj`` ``[N]`` and ``log_scale`` ``[N, D]``."""
    shift, raw = masked_linear(h, weight, bias, prefix, tiles, "identity").unflatten(1, (-1, 2)).unbind(2)
    log_scale = bound_log_scale(raw, bound, soft)
    return (x - shift) * torch.exp(-log_scale), -log_scale.sum(1), log_scale


def chain_forward(x: Tensor, chain: Chain) -> tuple[Tensor, Tensor]:
    """Returns ``z`` ``[N, D]`` and ``ladj`` ``[N]``."""
    ladj = x.new_zeros(x.shape[0])
    for b, (*hidden, output) in enumerate(chain.layers_of_blocks()):
        x = h = _permuted(x, chain.permutations[b])
        for k in hidden:
            h = masked_linear(h, *chain.layer(k), chain.activation)
        weight, bias, prefix, tiles = chain.layer(output)
        x, term, _ = affine_output(h, weight, bias, x, prefix, tiles, chain.bounds[b], chain.softs[b])
        ladj = ladj + term
    return _permuted(x, chain.permutations[-1]), ladj


def level_inverse(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    prefixes: Sequence[Tensor],
    tiles: Sequence[Tensor],
    schedule: Tensor,
    activation: str,
    bound: float,
    soft: bool,
) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]``."""
    weights = [_visible(w.to(z.dtype), *of) for w, *of in zip(weights, prefixes, tiles, strict=True)]
    ladj = z.new_zeros(z.shape[0])
    last = len(weights) - 1
    finished = [z[:, :0] for _ in weights]  # of x, then of each hidden layer's units
    rows = [0] * len(weights)  # of each layer, up to the ones that are finished

    def product(layer: int, piece: Sequence[int]) -> Tensor:
        count, width, stride, offset = piece
        start, rows[layer] = rows[layer], rows[layer] + count
        weight = _matrix(weights[layer], offset, count, stride)[:, :width]
        return matmul(finished[layer][:, :width], weight.mT) + biases[layer][start : start + count]

    for *hidden, output in plan_of(tiles, schedule):
        for piece in output:
            shift, raw = product(last, piece).unflatten(1, (-1, 2)).unbind(2)
            log_scale = bound_log_scale(raw, bound, soft)
            known = finished[0].shape[1]
            x = z[:, known : known + shift.shape[1]] * torch.exp(log_scale) + shift
            finished[0] = torch.cat((finished[0], x), dim=1)
            ladj = ladj + log_scale.sum(1)
        for k, pieces in enumerate(hidden):
            units = [_activated(product(k, piece), activation) for piece in pieces]
            finished[k + 1] = torch.cat((finished[k + 1], *units), dim=1)
    return finished[0], ladj


def chain_inverse(z: Tensor, chain: Chain) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[N, D]`` and ``ladj`` ``[N]``; the blocks are in the order of inversion."""
    ladj = z.new_zeros(z.shape[0])
    for b, layers in enumerate(chain.layers_of_blocks()):
        weights, biases, prefixes, tiles = zip(*(chain.layer(k) for k in layers), strict=True)
        z = _permuted(z, chain.permutations[b])
        options = chain.activation, chain.bounds[b], chain.softs[b]
        z, term = level_inverse(z, weights, biases, prefixes, tiles, chain.schedules[b], *options)
        ladj = ladj + term
    return _permuted(z, chain.permutations[-1]), ladj


def gradients(
    function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns the gradients of those of ``tensors`` that require one, for a backward formula of an op.

    They can be differentiated in turn, and batched.

    Args:
        function: returns what the op does, of ``tensors``, by the functions of this module.
        tensors: as the op received them.
        grads: of what the op returned; None for zero.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one tensor may have been computed from another, which is not this op's derivative.
        aliases = [tensor.view_as(tensor) if tensor.requires_grad else tensor for tensor in tensors]
        results = function(*aliases)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        wanted = [alias for alias in aliases if alias.requires_grad]
        outputs, above = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, wanted, above, create_graph=differentiable, materialize_grads=True)
    values: Iterator[Tensor] = iter(found)
    return [next(values) if tensor.requires_grad else None for tensor in tensors]


def _visible(weight: Tensor, prefix: Tensor, tiles: Tensor) -> Tensor:
    """Returns a packed weight with zeros in its padding, which then has no derivative of any order."""
    masks = []
    for start, stop, width, _ in tiles_of(tiles):
        columns = torch.arange(width, device=prefix.device)
        masks.append((columns < prefix[start:stop, None]).flatten())
    return torch.where(torch.cat(masks), weight, 0.0)


def _matrix(packed: Tensor, offset: int, rows: int, width: int) -> Tensor:
    """Returns the matrix ``[rows, width]`` that lies at ``offset``; no ``as_strided``, which vmap does not take."""
    return packed[offset : offset + rows * width].reshape(rows, width)


def _activated(y: Tensor, activation: str) -> Tensor:
    return torch.relu(y) if activation == "relu" else y


def _permuted(x: Tensor, permutation: Tensor) -> Tensor:
    return x[:, permutation] if permutation.numel() else x
