"""Registers ``fastmaf::chain_forward`` and its backward with torch: a flow's blocks in one call.

A call of a custom op costs some 60 µs of Python; three a block, and three more on the way back, are a tenth of what
scoring an image or a training step takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastmaf.kernels import composite
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.kernels.backends import implementation
from fastmaf.kernels.block import CHAIN_SCHEMA, Block, Chain, chain
from fastmaf.kernels.chain import kept as way
from fastmaf.kernels.factors import Factors, GradientSink, sink_of
from fastmaf.kernels.padding import keep_zero

T = TypeVar("T")


@torch.library.custom_op(
    "fastmaf::chain_forward",
    mutates_args=(),
    schema=f"(Tensor x, {CHAIN_SCHEMA}, bool keep) -> (Tensor, Tensor, Tensor)",
)
def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, keep = arguments
    keep_zero(fields[0], fields[2], fields[3])
    result: tuple[Tensor, Tensor, Tensor] = implementation("chain", x).forward(x, Chain(*fields), keep)
    return result


@_forward.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, keep = arguments
    n = x.shape[0]
    return x.new_empty(x.shape), x.new_empty(n), x.new_empty(way.kept_numel(Chain(*fields), n) if keep else 0)


@torch.library.custom_op(
    "fastmaf::chain_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad_z, Tensor grad_ladj, Tensor kept, {CHAIN_SCHEMA}, bool need_grad_x)"
        " -> (Tensor, Tensor[], Tensor[])"
    ),
)
def _backward(
    grad_z: Tensor, grad_ladj: Tensor, kept: Tensor, *arguments: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *fields, need_grad_x = arguments
    backend = implementation("chain", grad_z)
    grads: tuple[Tensor, list[Tensor], list[Tensor]] = backend.backward(
        grad_z, grad_ladj, kept, Chain(*fields), need_grad_x
    )
    return grads


@_backward.register_fake
def _(grad_z: Tensor, grad_ladj: Tensor, kept: Tensor, *arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *fields, need_grad_x = arguments
    of = Chain(*fields)
    grad_x = grad_z.new_empty(grad_z.shape[0] if need_grad_x else 0, grad_z.shape[1])
    return grad_x, [grad_z.new_empty(w.shape) for w in of.weights], [b.new_empty(b.shape) for b in of.biases]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, ladj, kept = output
    of, ctx.keeps = Chain(*inputs[1:-1]), inputs[-1]
    ctx.set_materialize_grads(False)  # that of `kept` would be as large as it is
    ctx.mark_non_differentiable(kept)
    # x is kept once already; for a second derivative it must be the tensor that came in.
    x = inputs[0] if inputs[0].requires_grad else z.new_empty(0)
    ctx.save_for_backward(z, ladj, kept, x, *of.weights, *of.biases)
    ctx.chain = of._replace(weights=[], biases=[])  # the rest is never written to


@outside_autocast
def _autograd(ctx: Any, grad_z: Tensor | None, grad_ladj: Tensor | None, _: Any) -> tuple[Any, ...]:
    if not ctx.keeps:
        raise RuntimeError(
            "chain_forward was called with keep=False, for passes that record no gradients: it has kept nothing to "
            "go back with"
        )
    z, ladj, kept, x, *tensors = ctx.saved_tensors
    weights, biases = _halves(tensors)
    of: Chain = ctx.chain._replace(weights=weights, biases=biases)
    none = ([None] * len(part) for part in (of.prefixes, of.tiles, of.schedules, of.permutations))
    if composite.needed_for((grad_z, grad_ladj)):
        x = x if x.requires_grad else way.first_x(of, kept, z.shape[0])
        grads = composite.gradients(partial(_composite, of), (x, *tensors), (grad_z, grad_ladj))
        return grads[0], *_halves(grads[1:]), *none, None, None, None, None
    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
    grad_ladj = torch.zeros_like(ladj) if grad_ladj is None else grad_ladj
    need_grad_x = ctx.needs_input_grad[0]
    sinks = [sink_of(weight, ctx) for weight in of.weights]
    grad_weights: Sequence[Tensor | None]
    grad_biases: Sequence[Tensor | None]
    if not any(sinks):
        grad_x, grad_weights, grad_biases = _backward(grad_z, grad_ladj, kept, *of, need_grad_x)
    else:
        grad_x, grad_weights, grad_biases = _to_sinks(ctx, sinks, grad_z, grad_ladj, kept, of, need_grad_x)
    return grad_x if need_grad_x else None, grad_weights, grad_biases, *none, None, None, None, None


def _composite(of: Chain, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    weights, biases = _halves(tensors)
    return composite.chain_forward(x, of._replace(weights=weights, biases=biases))


def _halves(sequence: Sequence[T]) -> tuple[list[T], list[T]]:
    half = len(sequence) // 2
    return list(sequence[:half]), list(sequence[half:])


def _to_sinks(
    node: Any,
    sinks: Sequence[GradientSink | None],
    grad_z: Tensor,
    grad_ladj: Tensor,
    kept: Tensor,
    of: Chain,
    need_grad_x: bool,
) -> tuple[Tensor, list[Tensor | None], Sequence[Tensor | None]]:
    """Goes back with the gradients of the weights handed to their sinks; a weight without one gets its gradient."""
    grad_weights: list[Tensor | None] = [None] * len(sinks)
    ready = [sink for sink in sinks if sink is not None and sink.updates_at_once]
    if len(ready) == len(sinks):
        backend = implementation("chain", grad_z)
        updates, bias_updates = [sink.begin_update() for sink in ready], None
        if backend.UPDATES_BIASES:
            of_biases = [sink_of(bias, node) for bias in of.biases]
            if all(sink is not None and sink.updates_at_once for sink in of_biases):
                bias_updates = [sink.begin_update() for sink in of_biases if sink is not None]
        grad_x, grad_biases = backend.adam_(grad_z, grad_ladj, kept, of, need_grad_x, updates, bias_updates)
        return grad_x, grad_weights, [None] * len(of.biases) if bias_updates else grad_biases

    def step(layer: int, factors: Factors, need_inputs: bool) -> tuple[Tensor, ...]:
        sink = sinks[layer]
        if sink is not None:
            return sink.take(factors, need_inputs)
        if of.weights[layer].requires_grad:
            grad_weights[layer] = factors.grad_weight()
        return factors.grad_inputs(need_inputs)

    grad_x, grad_biases = way.backward(grad_z, grad_ladj, kept, of, need_grad_x, step)
    return grad_x, grad_weights, grad_biases


_forward.register_autograd(_autograd, setup_context=_setup_context)


def chain_forward(x: Tensor, blocks: Sequence[Block], permutations: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Applies several blocks in turn, in one call.

    Args:
        x: ``[N, D]``.
        blocks: in the order in which x passes through them, all of one activation.
        permutations: int64 ``[D]``, one per block, applied before it as ``x[:, permutation]``, and one for after the
            last; None where there is none.

    Returns:
        ``z`` ``[N, D]`` and ``ladj`` ``[N]`` = log |det dz/dx| in nats.

    Raises:
        ValueError: there is no block, an activation is unknown, they differ, or permutations are not one more.
    """
    of = chain(blocks, permutations)
    if composite.needed():
        return composite.chain_forward(x, of)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *of.weights, *of.biases))
    z, ladj, _ = _forward(x.contiguous(), *of, keep)
    return z, ladj
