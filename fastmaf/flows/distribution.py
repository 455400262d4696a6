"""Flows as distributions of ``torch.distributions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from fastmaf.transforms import ElementwiseAffine, Logit, MonotonicRQS, Permutation, Transform
from fastmaf.validation import check_context

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class FlowDistribution(Distribution):
    """The distribution of a flow's samples, as a ``torch.distributions.Distribution``: a prior or a guide, a component
    of others, an argument of code that is written for these.

    Events are the vectors of D numbers. It refers to the flow, whose parameters it follows; it has none of its own, so
    that an optimiser is given ``flow.parameters()``. ``rsample`` is differentiable with respect to these, and to a
    context that requires gradients.

    Args:
        flow: the flow, a ``fastmaf.Flow``.
        context: ``[*batch, C]``, what the flow is conditioned on; None for a flow without a context.
        validate_args: whether ``log_prob`` checks that values lie in the support, as in ``torch.distributions``; the
            flow's own checks are those of ``flow.validate_args``.

    Attributes:
        flow: the flow.
        context: ``[*batch_shape, C]``, or None.
        batch_shape: that of the context, until ``expand`` sets another; empty without a context.
        event_shape: ``[D]``.

    Raises:
        TypeError: the context is neither a tensor nor an array of numbers.
        ValueError: the context is missing, unexpected, not finite, or of another size, dtype or device than the flow's.

    Example:
        >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
        >>> distribution = flow.distribution()
        >>> distribution.event_shape, distribution.expand([5]).sample().shape
        (torch.Size([3]), torch.Size([5, 3]))
        >>> positive = torch.distributions.TransformedDistribution(
        ...     distribution, [torch.distributions.transforms.ExpTransform()]
        ... )
        >>> positive.log_prob(positive.sample((4,))).shape
        torch.Size([4])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self, flow: Any, context: Tensor | ArrayLike | None = None, *, validate_args: bool | None = None
    ) -> None:
        self.flow, self.has_rsample = flow, flow.base.has_rsample
        self.context = flow._as_context(context)
        check_context(self.context, flow.context_features)
        batch_shape = torch.Size() if self.context is None else self.context.shape[:-1]
        super().__init__(batch_shape, torch.Size([flow.features]), validate_args=validate_args)

    @property
    def _given(self) -> tuple[Any, ...]:
        """The arguments of the flow's methods beside the first."""
        return () if self.context is None else (self.context,)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """The domain of the flow: a box where a ``Logit`` or a spline without tails comes first, after permutations
        and element-wise affine maps at most; else all vectors.
        """
        before: list[Transform] = []
        for transform in self.flow._transforms():
            if (bounds := _bounds(transform)) is not None:
                return constraints.independent(constraints.interval(*self._pulled_back(bounds, before)), 1)
            if type(transform) not in (Permutation, ElementwiseAffine):
                break
            before.append(transform)
        return constraints.real_vector

    @torch.no_grad()
    def _pulled_back(self, bounds: tuple[float, float], before: Sequence[Transform]) -> list[Any]:
        """Returns the bounds of x, given those after some transforms that leave each dimension by itself."""
        if not any(type(transform) is ElementwiseAffine for transform in before):
            return list(bounds)
        like = self.flow._like()
        rows = like.new_tensor(bounds)[:, None].expand(2, self.flow.features)
        for transform in reversed(before):
            rows, _ = transform.inverse(rows)
        return list(rows)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log-density of ``value`` ``[..., D]`` in nats, of its batch shape and this one broadcast."""
        if self._validate_args and value.numel():  # the constraints of torch refuse empty tensors
            self._validate_sample(value)
        result = self.flow.log_prob(value, *self._given)
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws samples ``[*sample_shape, *batch_shape, D]`` without recording gradients."""
        return self.flow.sample(self._batch_of(sample_shape), *self._given)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws samples ``[*sample_shape, *batch_shape, D]`` that are differentiable."""
        return self.flow.rsample(self._batch_of(sample_shape), *self._given)

    def _batch_of(self, sample_shape: Any) -> torch.Size:
        sample_shape = torch.Size(sample_shape)
        return sample_shape + self.batch_shape if self.context is None else sample_shape

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """Returns the distribution with another batch shape, to which the present one broadcasts."""
        new: FlowDistribution = self._get_checked_instance(FlowDistribution, _instance)
        batch_shape = torch.Size(batch_shape)
        if not _broadcasts(self.batch_shape, batch_shape):
            raise ValueError(f"batch shape {list(self.batch_shape)} cannot be expanded to {list(batch_shape)}")
        new.flow, new.has_rsample = self.flow, self.has_rsample
        new.context = None if self.context is None else self.context.expand(*batch_shape, self.context.shape[-1])
        super(FlowDistribution, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        context = "" if self.context is None else f", context={list(self.context.shape)}"
        return f"{type(self).__name__}({type(self.flow).__name__}(features={self.flow.features}){context})"


def _bounds(transform: Transform) -> tuple[float, float] | None:
    """Returns between which numbers each dimension must lie, where a transform has bounds."""
    if isinstance(transform, Logit):
        margin = transform.alpha / (1 - 2 * transform.alpha)
        return -margin, 1 + margin
    if isinstance(transform, MonotonicRQS) and not transform.spline.tails:
        return transform.spline.low, transform.spline.high
    return None


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))
