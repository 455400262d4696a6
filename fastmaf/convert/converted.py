"""A converted flow: what the calling conventions of all libraries have in common."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaf.convert.errors import NotConvertibleError
from fastmaf.convert.evaluation import copied
from fastmaf.flows import Flow
from fastmaf.transforms import ElementwiseAffine, Permutation, Transform

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Difference(NamedTuple):
    """How far a converted flow is from its source.

    Attributes:
        dtype: in which both were evaluated.
        what: ``"log_prob"``, ``"z"`` or ``"inverse"``.
        worst, mean: of the absolute differences.
        scale: the mean absolute value of the source's result.
    """

    dtype: torch.dtype
    what: str
    worst: float
    mean: float
    scale: float


class ConditionalBlock(nn.Module):
    """An autoregressive block with a context, which is a function of the source's context.

    The block takes it as such, or as its first dimensions: these have degrees below those of x, and pass through the
    block unchanged.

    Args:
        block: over x with a context, or over ``[context, x]``, with the dimensions of x in the order of the block.
        order: of the dimensions of x.
        context: maps a context ``[N, C]`` to the block's.
    """

    def __init__(self, block: Transform, order: Tensor, context: nn.Module) -> None:
        super().__init__()
        self.flow, self.permutation, self.context = Flow(block.features, [block]), Permutation(order), context

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``z`` and ``ladj`` for ``x`` ``[N, D]`` and ``context`` ``[N, C]``."""
        return self._map(self.flow, x, context)

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` and its ``ladj``."""
        return self._map(self.flow.inverse, z, context)

    def _map(self, direction: Callable[..., Any], x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        of_block, x = self.context(context), self.permutation(x)[0]
        if self.flow.context_features:
            z, ladj = direction(x, of_block)
        else:
            z, ladj = direction(torch.cat([of_block, x], 1))
            z = z[:, of_block.shape[1] :]
        return self.permutation.inverse(z)[0], ladj


class ConvertedFlow(nn.Module):
    """A flow that was converted from another library, from data x to a standard normal base.

    Args:
        features: D.
        parts: transforms and conditional blocks, in the order in which x passes through them.
        base: maps the base of the source, if it is no standard normal one, to it.
        source: the flow that it was converted from, kept for ``parity_report``.
    """

    _source: Any
    _ignores_context = False

    def __init__(
        self,
        features: int,
        parts: Sequence[Transform | ConditionalBlock],
        base: ElementwiseAffine | None,
        source: nn.Module,
    ) -> None:
        super().__init__()
        self.features, self._has_base = features, base is not None
        self._log_z = features * _HALF_LOG_2PI  # of the standard normal base
        parts = [*parts, *([] if base is None else [base])]
        # Of a flow with a context every part is called on its own.
        transforms = [part for part in parts if isinstance(part, Transform)]
        self.parts = nn.ModuleList([Flow(features, transforms)] if len(transforms) == len(parts) else parts)
        object.__setattr__(self, "_source", source)  # no submodule: its parameters are not those of this flow

    @property
    def flow(self) -> Flow:
        """The flow as one of this library, to train, save or export it.

        Raises:
            NotConvertibleError: it has a context.
        """
        if len(self.parts) == 1 and isinstance(self.parts[0], Flow):
            return self.parts[0]
        raise NotConvertibleError(
            "the context of the source enters its networks otherwise than that of a fastmaf.Flow, which adds a linear "
            "map of it to each layer: use the converted flow itself, which is trained and saved as a module"
        )

    @property
    def conditional(self) -> bool:
        """Whether it needs a context."""
        return any(isinstance(part, ConditionalBlock) for part in self.parts)

    def _check(self, context: Tensor | None, x: Tensor | None = None) -> None:
        if x is not None and (x.dim() != 2 or x.shape[1] != self.features):
            raise ValueError(f"expected a tensor [N, {self.features}]; found {list(x.shape)}")
        if self.conditional and context is None:
            raise ValueError("this flow was trained with a context; expected one, found None")
        if context is not None and not self.conditional and not self._ignores_context:
            raise ValueError(f"this flow has no context; expected None, found a tensor {list(context.shape)}")

    def to_base(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``z`` ``[N, D]`` of the standard normal base and ``ladj`` ``[N]`` for ``x`` ``[N, D]``."""
        self._check(context, x)
        total = x.new_zeros(x.shape[0])
        for part in self.parts:
            x, ladj = part(x, context) if isinstance(part, ConditionalBlock) else part(x)
            total = total + ladj
        return x, total

    def from_base(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``x`` and ``log |det dx/dz|``: the inverse of ``to_base``."""
        self._check(context, z)
        total = z.new_zeros(z.shape[0])
        for part in reversed(self.parts):
            is_block = isinstance(part, ConditionalBlock)
            z, ladj = part.inverse(z, context) if is_block else part.inverse(z)  # type: ignore[operator]
            total = total + ladj
        return z, total

    def log_density(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the log-density ``[N]`` in nats."""
        z, ladj = self.to_base(x, context)
        return ladj - 0.5 * z.square().sum(1) - self._log_z

    def _base(self) -> tuple[Tensor, Tensor] | None:
        """Returns mean and log-scale of the source's base, ``[D]``, or None if it is a standard normal one."""
        if not self._has_base:
            return None
        last = self.parts[-1].transforms[-1] if isinstance(self.parts[-1], Flow) else self.parts[-1]
        assert isinstance(last, ElementwiseAffine)
        return -last.shift * (-last.log_scale).exp(), -last.log_scale

    def to_latent(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``z`` ``[N, D]`` of the source's own base, and ``ladj`` ``[N]``."""
        z, ladj = self.to_base(x, context)
        if (base := self._base()) is None:
            return z, ladj
        mean, log_scale = base
        return torch.addcmul(mean, z, log_scale.exp()), ladj + log_scale.sum()

    def from_latent(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``x`` and ``log |det dx/dz|``: the inverse of ``to_latent``."""
        if (base := self._base()) is None:
            return self.from_base(z, context)
        mean, log_scale = base
        x, ladj = self.from_base((z - mean) * (-log_scale).exp(), context)
        return x, ladj - log_scale.sum()

    def draw(self, count: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``count`` samples ``[count, D]``, for a context each, and their log-densities; differentiable."""
        like = self._like()
        z = torch.randn(count, self.features, dtype=like.dtype, device=like.device)
        x, ladj = self.from_base(z, context)
        return x, -0.5 * z.square().sum(1) - self._log_z - ladj

    def _like(self) -> Tensor:
        return next(self.parameters(), torch.empty(0))

    def _embedded(self, context: Tensor | None) -> Tensor | None:
        """Returns what the blocks see of a context."""
        return context

    def _source_log_prob(self, source: Any, x: Tensor, context: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _source_to_latent(self, source: Any, x: Tensor, context: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _source_from_latent(self, source: Any, z: Tensor, context: Tensor | None) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def parity_report(self, x: Tensor, context: Tensor | None = None) -> list[Difference]:
        """Compares log_prob, z and the inverse of z with those of the source, in float64 and in float32.

        The inverse of the source takes one network pass per dimension. A difference in float64 is that of the weights:
        those of a float32 flow into which normalisations were multiplied are rounded to float32.

        Args:
            x: ``[N, D]``.
            context: ``[N, C]``, where the flow has one.

        Raises:
            ValueError: ``x`` has another shape, or the context is missing.
        """
        self._check(context, x)
        report = []
        for dtype in (torch.float64, torch.float32):
            own = copy.deepcopy(self, {id(self._source): self._source}).to(dtype)
            source = copied(self._source).to(x.device, dtype).eval()
            x, context = x.to(dtype), None if context is None else context.to(dtype)
            inner = own._embedded(context)
            z = self._source_to_latent(source, x, context)
            pairs = {
                "log_prob": (own.log_density(x, inner), self._source_log_prob(source, x, context)),
                "z": (own.to_latent(x, inner)[0], z),
                "inverse": (own.from_latent(z, inner)[0], self._source_from_latent(source, z, context)),
            }
            for what, (found, expected) in pairs.items():
                difference = (found - expected).double().abs()
                worst, mean = float(difference.max()), float(difference.mean())
                report.append(Difference(dtype, what, worst, mean, float(expected.double().abs().mean())))
        return report
