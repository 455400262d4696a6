"""A flow's forward and backward pass by the ops of its layers, each on the backend that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from fastmaf.kernels.adam.update import Update
from fastmaf.kernels.dispatch import implementation
from fastmaf.kernels.factored_grad import GradientSink
from fastmaf.kernels.flow.args import FlowArgs, FlowBatch, permuted
from fastmaf.kernels.flow.saved import activations, backward, new_saved

__all__ = ["UPDATES_BIASES", "adam_", "backward", "forward"]

# Whether adam_ updates the biases as well. They are small: torch's optimiser is as fast here.
UPDATES_BIASES = False


def forward(x: Tensor, args: FlowArgs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``z``, ``ladj`` ``[N]`` = log |det dz/dx|, and what ``backward`` needs if ``save``."""
    linear, affine = implementation("masked_linear", x), implementation("affine_output", x)
    n, ladj = x.shape[0], x.new_zeros(x.shape[0])
    saved = new_saved(x, args) if save else x.new_empty(0)
    places = activations(args, saved, n) if save else None
    for b, (*hidden_layers, output) in enumerate(args.layers_of_blocks()):
        h = x = permuted(x, args.permutations[b])
        hidden = []
        for i in hidden_layers:
            h = linear.forward(h, args.hidden(i))
            hidden.append(h)
        z, term, log_scale = affine.forward(h, x, args.output(b, output))
        ladj = ladj + term
        if places is not None:
            own = (x, *hidden, log_scale, z)
            for to, value in zip((places[b].x, *places[b].hidden, *places[b][2:]), own, strict=True):
                to.copy_(value)
        x = z
    return permuted(x, args.permutations[-1]), ladj, saved


def adam_(
    batch: FlowBatch, args: FlowArgs, need_grad_x: bool, updates: Sequence[Update], bias_updates: None
) -> tuple[Tensor, list[Tensor]]:
    """Takes a step of Adam on every weight, in place; returns the gradients of ``x`` and of the biases."""
    sinks = [GradientSink(None, partial(_known, update)) for update in updates]
    grad_x, _, grad_biases = backward(batch, args, need_grad_x, sinks)
    return grad_x, grad_biases


def _known(update: Update) -> Update:
    return update
