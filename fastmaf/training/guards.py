"""Guards of a training step, and the checks of a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class NonFiniteLossError(FloatingPointError):
    """The loss of a batch is NaN or infinite; the parameters are as they were before that batch.

    Example:
        >>> flow = fastmaf.MAF(features=2, blocks=1, hidden_features=8, validate_args=False)
        >>> optimizer = fastmaf.optim.FusedAdam(flow.parameters())
        >>> loss = -flow.log_prob(torch.full((4, 2), torch.nan)).mean()
        >>> try:
        ...     optimizer.minimize(loss)
        ... except fastmaf.NonFiniteLossError:
        ...     print("skipped")
        skipped
    """


@dataclass(frozen=True)
class Guards:
    """Limits on a training step, which keep deep flows with alternating orders from diverging. The default has none.

    A flow of several blocks multiplies their scales, so one step that is too large changes the loss by orders of
    magnitude, from which Adam's moments take epochs to recover. All limits are *per dimension*, so that one setting
    serves every data dimension D:

        lr_t = lr · min(1, t / warmup_steps)
        g ← g · min(1, max_grad_norm / ‖g‖),  where g is the gradient of the loss / D
        skip the step where (loss − running mean of the loss) / D > max_loss_jump

    Attributes:
        warmup_steps: number of steps over which the learning rate rises linearly.
        max_grad_norm: largest L2 norm of the gradient of the loss per dimension (nats/dim); None for no limit.
        max_loss_jump: a step is skipped where its loss exceeds the running mean by more than this (nats/dim); None for
            no limit.

    Raises:
        ValueError: an argument is negative, or a limit is not a positive finite number.

    Example:
        >>> fastmaf.Guards(warmup_steps=100, max_grad_norm=50.0, max_loss_jump=10.0)
        Guards(warmup_steps=100, max_grad_norm=50.0, max_loss_jump=10.0)
    """

    warmup_steps: int = 0
    max_grad_norm: float | None = None
    max_loss_jump: float | None = None

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more; found {self.warmup_steps}")
        for name in ("max_grad_norm", "max_loss_jump"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, or None for no limit; found {value}")


def clip_scale(norm: float, max_norm: float) -> float:
    """Returns the factor that scales gradients of norm ``norm`` down to ``max_norm``; 1 where they need no scaling."""
    return max_norm / norm if math.isfinite(norm) and norm > max_norm else 1.0


def check_processes() -> None:
    """Raises RuntimeError where several processes run, over which an optimiser does not average its gradients."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and (size := distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"torch.distributed runs {size} processes, over which this optimizer does not average gradients: build it "
            "as FusedAdam(..., process_group=torch.distributed.group.WORLD), or use loss.backward() with "
            "DistributedDataParallel, and step()"
        )


def check_loss(loss: Tensor, *, finite: bool) -> None:
    """Checks that a loss can be minimised and, with ``finite``, that it is finite, which waits for a GPU.

    Raises:
        NonFiniteLossError: ``loss`` is NaN or infinite.
        ValueError: ``loss`` is not a real scalar that requires grad.
        RuntimeError: ``loss`` was scaled by ``torch.amp.GradScaler``.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        found = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must be a real scalar, such as -flow.log_prob(x).mean(); found {found}")
    if loss.grad_fn is None:
        raise ValueError(
            "loss must depend on parameters that require grad; found a tensor without an autograd graph: it was "
            "detached or computed under torch.no_grad(), or all parameters are frozen"
        )
    if _is_scaled(loss):
        raise RuntimeError(
            "minimize() cannot unscale a loss that was scaled by torch.amp.GradScaler: pass the unscaled loss, or use "
            "scaler.scale(loss).backward() and scaler.step(optimizer). To scale a loss yourself, multiply it by a "
            "Python number"
        )
    if finite and not math.isfinite(value := float(loss.detach())):
        raise NonFiniteLossError(f"the loss became {value}: nothing was updated")


def _is_scaled(loss: Tensor) -> bool:
    """Returns whether ``loss`` is a product with the factor of ``GradScaler.scale``: a float32 power of two."""
    is_product = type(loss.grad_fn).__name__ == "MulBackward0"
    factor = getattr(loss.grad_fn, "_saved_other", None) if is_product else None
    if not isinstance(factor, Tensor) or factor.dim() or factor.dtype != torch.float32 or factor.requires_grad:
        return False
    scale = float(factor)
    return scale > 1 and math.frexp(scale)[0] == 0.5
