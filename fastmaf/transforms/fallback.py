"""The warning given where blocks are trained layer by layer."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastmaf.kernels import dispatch
from fastmaf.kernels.activations import OP_ACTIVATIONS
from fastmaf.kernels.op import records_gradients
from fastmaf.nn import MADE


class FallbackWarning(UserWarning):
    """Blocks are trained layer by layer, since no op of the backend computes them as a whole: this is slower, and gives
    the same numbers.

    ``fastmaf doctor`` lists these blocks. The warning is given once per process, in the first call in training mode
    that records gradients with a backend whose ops train other blocks as a whole.

    Example:
        >>> import warnings
        >>> warnings.filterwarnings("ignore", category=fastmaf.FallbackWarning)
    """


_given = False
_thread = threading.local()


@contextmanager
def without_warning() -> Iterator[None]:
    """Gives no ``FallbackWarning`` in this thread: for models of the library itself, whose blocks nobody else chose."""
    before, _thread.is_off = getattr(_thread, "is_off", False), True
    try:
        yield
    finally:
        _thread.is_off = before


def warn_of_layers(made: MADE, kind: str | None, x: Tensor) -> None:
    """Warns once if the layers of a block run one by one while it is trained on ``x``.

    Args:
        made: the network of the block.
        kind: what the ops do not compute besides the network, None if there is no such thing.
        x: the input of the block.
    """
    global _given
    if torch.compiler.is_compiling() or _given or not made.training:  # in this order: no graph depends on the global
        return
    if not (kind or made.composed) or getattr(_thread, "is_off", False):
        return
    reasons = _reasons(made, kind)
    if not reasons or not records_gradients([x, *made.parameters()]):
        return
    backend = dispatch.chosen() or dispatch.default_backend("flow", x)
    if backend == "torch":
        return
    warnings.warn(
        f"blocks with {' and '.join(reasons)} are trained layer by layer, which is slower than the op of whole blocks "
        f"that backend {backend!r} has for others, and gives the same numbers; `fastmaf doctor` lists these blocks. "
        "This warning is given once per process. To evaluate a density without training, use torch.no_grad().",
        FallbackWarning,
        stacklevel=2,
    )
    _given = True  # not before: a filter that makes it an error then does so in each call


def _reasons(made: MADE, kind: str | None) -> list[str]:
    """Returns what the ops of whole blocks do not compute while a block is trained; see ``MADE.composed``."""
    others = sorted(set(made.activations).difference(OP_ACTIVATIONS))
    if others:
        activation = f"the activation {', '.join(map(repr, others))}"
    else:
        activation = "" if made.residual or made.activation in OP_ACTIVATIONS else "several activations"
    return [
        *([kind] if kind else []),
        *(["residual blocks"] if made.residual else []),
        *(["a context"] if made.context_features else []),
        *([activation] if activation else []),
        *(["dropout"] if made.drops_units else []),
    ]
