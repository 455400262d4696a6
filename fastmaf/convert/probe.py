"""A numerical check of every converted part: it must agree with its source at a few points.

The checks of ``source.py`` see what a module is made of. A module may still compute something else, in another version
of its library, or because its class was changed while the program runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastmaf.convert.converted import ConditionalBlock
from fastmaf.convert.errors import NotConvertibleError
from fastmaf.convert.parts import kind
from fastmaf.transforms import MonotonicRQS, Transform

Part: TypeAlias = Transform | ConditionalBlock
# Of x ``[N, D]`` and a context ``[N, C]`` or None: the result ``[N, D]`` and ``ladj`` ``[N]``.
Call: TypeAlias = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]

_ROWS = 3
_MOST = {torch.float64: 1e-7, torch.float32: 1e-2}  # norm-wise; what is not the same function differs by more


@torch.no_grad()
def probe(source: nn.Module, parts: Sequence[Part], call: Call, like: Tensor, context: int, inverse: bool) -> None:
    """Compares a source with what it was converted to.

    Args:
        source: the module, in evaluation mode.
        parts: its conversion, from data to the base.
        call: calls the source.
        like: ``[D]``, of the dtype and device of the source.
        context: number of features of its context.
        inverse: whether the source maps the base to data.

    Raises:
        NotConvertibleError: they differ, the source cannot be called, or it has another number of features.
    """
    for part in parts:
        features = part.permutation.features if isinstance(part, ConditionalBlock) else part.features
        if features != len(like):
            raise NotConvertibleError(f"{kind(source)} has {features} features, the flow {len(like)}")
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(_ROWS, len(like), generator=generator, dtype=torch.float64)
    splines = [module.spline for part in parts for module in part.modules() if isinstance(module, MonotonicRQS)]
    bounded = not all(spline.tails for spline in splines)
    x = (u if bounded else 6 * u - 3).to(like)
    c = torch.randn(_ROWS, context, generator=generator, dtype=torch.float64).to(like) if context else None
    try:
        expected, expected_ladj = call(x, c)
    except Exception as error:  # of the source, which may raise anything
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise NotConvertibleError(f"{kind(source)} cannot be called at random points: {reason}") from error
    found, found_ladj = x, x.new_zeros(_ROWS)
    for part in reversed(parts) if inverse else parts:
        function: Call = part.inverse if inverse else part  # type: ignore[assignment]
        found, ladj = function(found, c) if isinstance(part, ConditionalBlock) else function(found)  # type: ignore[call-arg]
        found_ladj = found_ladj + ladj
    most = _MOST.get(like.dtype, 0.2)
    for name, a, b in (("result", found, expected), ("log-determinant", found_ladj, expected_ladj)):
        b = b.expand_as(a)
        difference, scale = float((a - b).norm()), float(b.norm()) + b.numel() ** 0.5
        if bool(b.isfinite().all()) and not difference < most * scale:
            raise NotConvertibleError(
                f"{kind(source)} does not compute what its class is known for: at random points the {name} of its "
                f"conversion differs by {difference / scale:.1e}"
            )
