"""Gradients of the inverse of an autoregressive transform whose network must be called as a module, from those of its
forward pass alone. Of other networks see ``kernels/flow/network_inverse.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

# Of x ``[N, D]``: z and the log-derivatives log dz[d]/dx[d], both ``[N, D]``.
Forward: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


def implicit_inverse(forward: Forward, x: Tensor, z: Tensor, ends: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Makes ``x``, the inverse of ``z``, differentiable with respect to ``z`` and whatever ``forward`` depends on::

        z = f(x; θ)    ⇒    J dx = dz − (∂f/∂θ) dθ,    J = ∂f/∂x, lower triangular

    The backward pass solves with the transpose of J, by one backward pass of ``forward`` per step, the last dimensions
    first. Nothing is kept for it but what one forward pass keeps, and without it the steps cost nothing.

    Args:
        forward: f; dimension d of z depends on the dimensions up to d of x.
        x: ``[N, D]``, without gradients.
        z: ``[N, D]``.
        ends: ascending; the dimensions between two of them do not depend on each other.

    Returns:
        ``x`` and ``ladj`` ``[N]`` = log |det dx/dz|, both differentiable once: a backward pass that is recorded, for
        second derivatives, raises RuntimeError.
    """
    x = x.detach()
    x = _Solved.apply(z - forward(x)[0], x, forward, ends)
    return x, -forward(x)[1].sum(1)


class _Solved(torch.autograd.Function):
    """Returns ``x``; its gradient passes through J⁻¹ to the ``residual``, z − f(x), which is zero."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, forward: Forward, ends: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.forward_of_x, ctx.ends = forward, ends
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # Not once_differentiable: its error is on no path from the result to the inputs, which would seem unused.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradients of this inverse cannot be differentiated again (create_graph=True): those of blocks "
                "without hooks, parametrizations and modules of other classes can, and torch.func transforms, such "
                "as torch.func.hessian, differentiate every inverse"
            )
        [x] = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            z, log_slopes = ctx.forward_of_x(x)
        slopes, solved = log_slopes.detach().exp(), torch.zeros_like(grad)
        starts = (0, *ctx.ends[:-1])
        for start, end in reversed(list(zip(starts, ctx.ends, strict=True))):
            # Of the later dimensions, which are solved; those that are not are zero.
            [later] = torch.autograd.grad(z, x, solved, retain_graph=True)
            solved[:, start:end] = ((grad - later) / slopes)[:, start:end]
        return solved, None, None, None
