"""Checks that ``FusedAdam.minimize`` makes before it changes anything."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class NonFiniteLossError(FloatingPointError):
    """The loss of a batch is NaN or infinite; the parameters were left as they were before that batch."""


def check_processes() -> None:
    """Raises RuntimeError where several processes train together: only stored gradients are exchanged."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and (size := distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"torch.distributed runs {size} processes, and minimize() exchanges no gradients between them: use "
            "loss.backward(), which DistributedDataParallel watches, and step()"
        )


def check_loss(loss: Tensor, *, finite: bool) -> None:
    """Checks that a loss is a scalar that can be minimised, and, where asked to, that it is finite.

    Raises:
        NonFiniteLossError: it is NaN or infinite.
        ValueError: it is not a real scalar that requires grad.
        RuntimeError: it was scaled by ``torch.amp.GradScaler``.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        found = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must be a real scalar, such as -flow.log_prob(x).mean(); found {found}")
    if loss.grad_fn is None:
        raise ValueError(
            "loss must depend on parameters that require grad; found one without a graph: it was detached, computed "
            "under torch.no_grad(), or all parameters are frozen"
        )
    if _is_scaled(loss):
        raise RuntimeError(
            "loss looks scaled by torch.amp.GradScaler, which minimize() cannot unscale: pass the loss itself, or use "
            "scaler.scale(loss).backward() and scaler.step(optimizer). Multiply by constants of your own as Python "
            "numbers"
        )
    if finite and not math.isfinite(value := float(loss.detach())):
        raise NonFiniteLossError(f"the loss became {value}: nothing was updated")


def _is_scaled(loss: Tensor) -> bool:
    """Says whether the loss is a product with what ``GradScaler.scale`` multiplies by: a float32 power of two."""
    if type(loss.grad_fn).__name__ != "MulBackward0":
        return False
    other = getattr(loss.grad_fn, "_saved_other", None)
    if not isinstance(other, Tensor) or other.dim() or other.dtype != torch.float32 or other.requires_grad:
        return False
    scale = float(other)
    return scale > 1 and math.frexp(scale)[0] == 0.5
