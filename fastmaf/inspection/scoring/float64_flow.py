"""Flows evaluated in float64, so that an image's score does not depend on the batch it is in.

In float32 the last digits of a matrix product or a convolution depend on the batch size, the number of threads and the
BLAS library: an image whose score equals the threshold could be good in one batch and anomalous in another. In float64
these differences are about 1e-15 of a score, and rounding to 28 bits removes them. A Gaussian whitening is as fast as
in float32, where it needs four matrix products for full accuracy; here two are enough.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor

import fastmaf

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_SPLIT = 2.0**25 + 1  # keeps 28 of the 53 bits of a float64
_CHUNK = 2**14  # numbers per float64 convolution: larger chunks do not fit the processor's cache


def rounded(x: Tensor) -> Tensor:
    """Returns float64 values rounded to 28 bits (relative error at most 2⁻²⁹), which removes batch effects.

    References:
        Dekker 1971, A floating-point technique for extending the available precision (Veltkamp's splitting).
    """
    scaled = x * _SPLIT
    return torch.where(scaled.isfinite(), scaled - (scaled - x), x)


def first_part(flow: fastmaf.Flow) -> list[fastmaf.Transform]:
    """Returns the transforms up to and including the whitening, or the first transform of a flow without one."""
    steps = [step for step in flow.transforms if isinstance(step, fastmaf.Transform)]
    ends = [i for i, step in enumerate(steps) if isinstance(step, fastmaf.GaussianWhitening)] or [0]
    return steps[: ends[0] + 1]


def check_base(flow: fastmaf.Flow) -> None:
    """Raises ValueError if the base is not the standard normal distribution, whose density the terms are of."""
    if not flow.has_standard_base:
        raise ValueError(f"inspection needs a flow with a standard normal base; found {type(flow.base).__name__}")


class Whitening64:
    """A Gaussian whitening in float64, with two matrix products.

    ``factors`` are treated as orthonormal; fitted ones are to 1e-8.
    """

    def __init__(self, step: fastmaf.GaussianWhitening) -> None:
        names = ("mean", "scale", "factors", "variance")
        self.mean, self.scale, self.factors, self.variance = (getattr(step, name).double() for name in names)
        self.ladj = -float(self.scale.log().sum() + 0.5 * self.variance.log1p().sum())

    @cached_property
    def terms(self) -> Tensor:
        """Each dimension's share of -ladj ``[D]``; a factor's share is split in proportion to its squared entries."""
        return self.scale.log() + self.factors.square() @ (0.5 * self.variance.log1p())

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` ``[n, D]`` in noise standard deviations, and its components along the factors ``[n, rank]``."""
        y = (x - self.mean) / self.scale
        return y, y @ self.factors

    def unexplained(self, y: Tensor, components: Tensor, factors: int | None = None) -> Tensor:
        """Returns the residual of ``projected`` values after the first ``factors`` factors (None: all)."""
        root = (1 + self.variance[:factors]).sqrt()
        # 1/root - 1, without subtracting two nearly equal numbers
        less_one = -self.variance[:factors] / (root * (1 + root))
        return torch.addmm(y, components[:, :factors] * less_one, self.factors[:, :factors].T)


def _float64_copies(steps: Iterable[fastmaf.Transform]) -> list[fastmaf.Transform]:
    return [copy.deepcopy(step).double().eval() for step in steps]


class Float64Flow:
    """A float64 copy of a flow's transforms; later changes of the flow do not affect it.

    Attributes:
        before: the transforms before the whitening.
        first: the whitening, or the first transform of a flow without one.
        after: the remaining transforms.
    """

    first: Whitening64 | fastmaf.Transform

    def __init__(self, flow: fastmaf.Flow) -> None:
        check_base(flow)
        *before, first = first_part(flow)
        steps = [step for step in flow.transforms if isinstance(step, fastmaf.Transform)]
        self.features = flow.features
        self.before = _float64_copies(before)
        self.first = Whitening64(first) if isinstance(first, fastmaf.GaussianWhitening) else _float64_copies([first])[0]
        self.after = _float64_copies(steps[len(before) + 1 :])


class FlowValues:
    """Quantities of images under a flow, in float64; each is computed on first access.

    Args:
        flow: a ``fastmaf.Flow`` or its float64 copy.
        x: images ``[n, D]``.
    """

    def __init__(self, flow: fastmaf.Flow | Float64Flow, x: Tensor) -> None:
        self.flow = Float64Flow(flow) if isinstance(flow, fastmaf.Flow) else flow
        self.x = x

    @cached_property
    @torch.no_grad()
    def whitening_input(self) -> tuple[Tensor, Tensor]:
        """The input of the whitening ``[n, D]``, and the ladj of the transforms before it ``[n]``."""
        x = self.x.double()
        ladj = x.new_zeros(len(x))
        for step in self.flow.before:
            x, change = step(x)
            ladj = ladj + change
        return x, ladj

    @cached_property
    @torch.no_grad()
    def projected(self) -> tuple[Tensor, Tensor]:
        """``Whitening64.projected`` of the whitening's input."""
        assert isinstance(self.flow.first, Whitening64)
        return self.flow.first.projected(self.whitening_input[0])

    @cached_property
    @torch.no_grad()
    def whitened(self) -> tuple[Tensor, Tensor]:
        """The output of the whitening ``[n, D]``, and the ladj up to and including it ``[n]``."""
        (x, ladj), step = self.whitening_input, self.flow.first
        if isinstance(step, Whitening64):
            return step.unexplained(*self.projected), ladj + step.ladj
        x, change = step(x)
        return x, ladj + change

    @cached_property
    @torch.no_grad()
    def nll(self) -> Tensor:
        """NLL ``[n]`` in nats, rounded."""
        parts = []
        for z, ladj in self._chunks(*self.whitened):
            for step in self.flow.after:
                z, change = step(z)
                ladj = ladj + change
            parts.append(0.5 * z.square().sum(dim=1) - ladj)
        return rounded(torch.cat(parts) + self.flow.features * _HALF_LOG_2PI)

    @torch.no_grad()
    def nll_per_dim(self) -> Tensor:
        """Returns each dimension's share of the NLL ``[n, D]``; see ``fastmaf.Flow.nll_per_dim``."""
        x = self.x.double()
        terms, parts, first = torch.zeros_like(x), [], self.flow.first
        for step in self.flow.before:
            x, terms = step.forward_per_dim(x, terms)
        if isinstance(first, Whitening64):
            x, terms = self.whitened[0], terms + first.terms
        else:
            x, terms = first.forward_per_dim(x, terms)
        for z, shares in self._chunks(x, terms):
            for step in self.flow.after:
                z, shares = step.forward_per_dim(z, shares)
            parts.append(shares + 0.5 * z.square() + _HALF_LOG_2PI)
        return torch.cat(parts)

    def _chunks(self, x: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields a few rows at a time on the CPU if transforms follow, and all rows otherwise."""
        few = x.device.type == "cpu" and bool(self.flow.after)
        rows = max(1, _CHUNK // self.flow.features) if few else max(1, len(x))
        yield from zip(x.split(rows), other.split(rows), strict=True)
