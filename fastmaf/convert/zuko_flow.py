"""Converted flows that are called as those of zuko: distributions and transformations for a context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, Normal, Transform, constraints

from fastmaf.convert.converted import ConvertedFlow


class ZukoFlow(ConvertedFlow):
    """A converted flow that is called as ``zuko.flows.MAF``: ``flow(context)`` is a distribution.

    Made by ``from_zuko``; see there for an example.
    """

    def forward(self, c: Tensor | None = None) -> ConvertedDistribution:
        """Returns the distribution for a context ``[..., C]``."""
        self._check(c)
        return ConvertedDistribution(self, c)

    def transform(self, c: Tensor | None = None) -> ConvertedTransform:
        """Returns the transformation from data to the base for a context ``[..., C]``."""
        return self(c).transform  # type: ignore[no-any-return]

    def base(self, c: Tensor | None = None) -> Distribution:
        """Returns the base; it ignores the context."""
        like = self._like()
        mean, log_scale = self._base() or (like.new_zeros(self.features),) * 2
        return Independent(Normal(mean, log_scale.exp(), validate_args=False), 1, validate_args=False)

    def _source_log_prob(self, source: Any, x: Tensor, context: Tensor | None) -> Tensor:
        return source(context).log_prob(x)  # type: ignore[no-any-return]

    def _source_to_latent(self, source: Any, x: Tensor, context: Tensor | None) -> Tensor:
        return source.transform(context)(x)  # type: ignore[no-any-return]

    def _source_from_latent(self, source: Any, z: Tensor, context: Tensor | None) -> Tensor:
        return source.transform(context).inv(z)  # type: ignore[no-any-return]


class ConvertedDistribution(Distribution):
    """The distribution of a converted flow for a context, as ``zuko.distributions.NormalizingFlow``.

    Args:
        flow: the flow.
        context: ``[..., C]``, or None.
    """

    has_rsample = True
    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 1)

    def __init__(self, flow: ZukoFlow, context: Tensor | None, batch_shape: Size | None = None) -> None:
        self.flow, self.context = flow, context
        if batch_shape is None:
            batch_shape = Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, Size([flow.features]), validate_args=False)

    @property
    def transform(self) -> ConvertedTransform:
        """The transformation from data to the base."""
        return ConvertedTransform(self.flow, self.context)

    @property
    def base(self) -> Distribution:
        """The base, of the batch shape of this distribution."""
        return self.flow.base().expand(self.batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ConvertedDistribution:
        """Returns the distribution with a larger batch shape."""
        context = self.context
        if context is not None:
            context = context.expand(*batch_shape, context.shape[-1])
        return ConvertedDistribution(self.flow, context, Size(batch_shape))

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-density ``[...]`` of ``x`` ``[..., D]``."""
        rows, context, shape = _rows(x, self.context, self.batch_shape)
        return self.flow.log_density(rows, context).reshape(shape)

    def rsample(self, shape: Any = ()) -> Tensor:  # type: ignore[override]
        """Draws ``[*shape, *batch_shape, D]``, differentiably."""
        return self.rsample_and_log_prob(shape)[0]

    def rsample_and_log_prob(self, shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draws as ``rsample``, and returns the log-densities beside the samples."""
        full = Size(shape) + self.batch_shape
        x, log_prob = self.flow.draw(full.numel(), _contexts(self.context, full))
        return x.reshape(*full, self.flow.features), log_prob.reshape(full)


class ConvertedTransform(Transform):
    """The transformation of a converted flow for a context, from data to the base.

    Args:
        flow: the flow.
        context: ``[..., C]``, or None.
        inverted: from the base to data.
    """

    bijective = True
    domain = codomain = constraints.independent(constraints.real, 1)

    def __init__(self, flow: ZukoFlow, context: Tensor | None, inverted: bool = False) -> None:
        super().__init__()
        self.flow, self.context, self.inverted = flow, context, inverted

    @property
    def inv(self) -> ConvertedTransform:
        """The inverse transformation."""
        return ConvertedTransform(self.flow, self.context, not self.inverted)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the result ``[..., D]`` and ``ladj`` ``[...]`` for ``x`` ``[..., D]``."""
        rows, context, shape = _rows(x, self.context, Size())
        y, ladj = self.flow.from_latent(rows, context) if self.inverted else self.flow.to_latent(rows, context)
        return y.reshape(*shape, y.shape[-1]), ladj.reshape(shape)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inv.call_and_ladj(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns ``ladj`` ``[...]``."""
        return self.call_and_ladj(x)[1]


def _rows(x: Tensor, context: Tensor | None, batch: Size) -> tuple[Tensor, Tensor | None, Size]:
    """Returns the rows of ``x`` and of a context, and the batch shape to which both and ``batch`` are broadcast."""
    of_context = Size() if context is None else context.shape[:-1]
    shape = torch.broadcast_shapes(x.shape[:-1], of_context, batch)
    return x.expand(*shape, x.shape[-1]).reshape(-1, x.shape[-1]), _contexts(context, shape), shape


def _contexts(context: Tensor | None, shape: Size) -> Tensor | None:
    return None if context is None else context.expand(*shape, context.shape[-1]).reshape(-1, context.shape[-1])
