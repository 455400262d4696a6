"""Flows evaluated in float64, so that a score depends on its image alone.

In float32 the last digits of a matrix product or a convolution depend on the batch, the number of threads and the BLAS:
an image whose score is the threshold would be good in one batch and anomalous in another. In float64 those differences
are some 1e-15 of a score, and rounding to 28 bits removes them. A Gaussian whitening costs no more than in float32,
where it takes four products to be exact: here two are enough.
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
_SPLIT = 2.0**25 + 1  # of the 53 bits of a float64, 28 are left
_CACHED = 2**16  # numbers that a convolution in float64 takes at a time: more leave the processor's cache


def rounded(x: Tensor) -> Tensor:
    """Returns float64 values rounded to 28 bits, a relative 2⁻²⁹ at most: what depends on a batch lies below that.

    References:
        Dekker 1971, A floating-point technique for extending the available precision (Veltkamp's splitting).
    """
    scaled = x * _SPLIT
    return torch.where(scaled.isfinite(), scaled - (scaled - x), x)


def first_part(flow: fastmaf.Flow) -> list[fastmaf.Transform]:
    """Returns the transforms up to the whitening, or the first one of a flow without."""
    steps = [step for step in flow.transforms if isinstance(step, fastmaf.Transform)]
    ends = [i for i, step in enumerate(steps) if isinstance(step, fastmaf.GaussianWhitening)] or [0]
    return steps[: ends[0] + 1]


class Whitening64:
    """A Gaussian whitening in float64, in two products; ``factors`` are taken as orthonormal, which those of a fit are
    to 1e-8.
    """

    def __init__(self, step: fastmaf.GaussianWhitening) -> None:
        names = ("mean", "scale", "factors", "variance")
        self.mean, self.scale, self.factors, self.variance = (getattr(step, name).double() for name in names)
        self.ladj = -float(self.scale.log().sum() + 0.5 * self.variance.log1p().sum())

    @cached_property
    def terms(self) -> Tensor:
        """Each dimension's share of -ladj ``[D]``: that of a factor belongs to dimensions as its square does."""
        return self.scale.log() + self.factors.square() @ (0.5 * self.variance.log1p())

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` ``[n, D]`` in deviations of the noise, and its components along the factors ``[n, rank]``."""
        y = (x - self.mean) / self.scale
        return y, y @ self.factors

    def unexplained(self, y: Tensor, along: Tensor, factors: int | None = None) -> Tensor:
        """Returns what the first ``factors`` (None: all) leave of what ``projected`` returned."""
        root = (1 + self.variance[:factors]).sqrt()
        # 1/root - 1 without the difference of two numbers near each other.
        less_one = -self.variance[:factors] / (root * (1 + root))
        return torch.addmm(y, along[:, :factors] * less_one, self.factors[:, :factors].T)


def _copies(steps: Iterable[fastmaf.Transform]) -> list[fastmaf.Transform]:
    return [copy.deepcopy(step).double().eval() for step in steps]


class Float64Flow:
    """The transforms of a flow in float64: a copy, which later changes of the flow leave as it is.

    Attributes:
        before: what stands before the whitening.
        first: the whitening, or the first transform of a flow without.
        after: what follows.
    """

    first: Whitening64 | fastmaf.Transform

    def __init__(self, flow: fastmaf.Flow) -> None:
        *before, first = first_part(flow)
        steps = [step for step in flow.transforms if isinstance(step, fastmaf.Transform)]
        self.features = flow.features
        self.before = _copies(before)
        self.first = Whitening64(first) if isinstance(first, fastmaf.GaussianWhitening) else _copies([first])[0]
        self.after = _copies(steps[len(before) + 1 :])

    @classmethod
    def of(cls, flow: fastmaf.Flow | Float64Flow) -> Float64Flow:
        """Returns the flow itself where it is one already."""
        return cls(flow) if isinstance(flow, fastmaf.Flow) else flow


class Evaluated:
    """What a flow makes of images ``x`` ``[n, D]``, in float64; each quantity is computed when it is first asked for.

    Attributes:
        flow, x: what is evaluated.
    """

    def __init__(self, flow: fastmaf.Flow | Float64Flow, x: Tensor) -> None:
        self.flow, self.x = Float64Flow.of(flow), x

    @cached_property
    @torch.no_grad()
    def given(self) -> tuple[Tensor, Tensor]:
        """What goes into the whitening ``[n, D]``, and the log-determinant up to there ``[n]``."""
        x = self.x.double()
        ladj = x.new_zeros(len(x))
        for step in self.flow.before:
            x, change = step(x)
            ladj = ladj + change
        return x, ladj

    @cached_property
    @torch.no_grad()
    def projected(self) -> tuple[Tensor, Tensor]:
        """What ``Whitening64.projected`` makes of it."""
        assert isinstance(self.flow.first, Whitening64)
        return self.flow.first.projected(self.given[0])

    @cached_property
    @torch.no_grad()
    def whitened(self) -> tuple[Tensor, Tensor]:
        """What comes out of it, and the log-determinant up to there."""
        (x, ladj), step = self.given, self.flow.first
        if isinstance(step, Whitening64):
            return step.unexplained(*self.projected), ladj + step.ladj
        x, change = step(x)
        return x, ladj + change

    @cached_property
    @torch.no_grad()
    def nll(self) -> Tensor:
        """NLL ``[n]`` in nats, rounded."""
        found = []
        for z, ladj in self._parts(*self.whitened):
            for step in self.flow.after:
                z, change = step(z)
                ladj = ladj + change
            found.append(0.5 * z.square().sum(dim=1) - ladj)
        return rounded(torch.cat(found) + self.flow.features * _HALF_LOG_2PI)

    @torch.no_grad()
    def nll_per_dim(self) -> Tensor:
        """Returns each dimension's share of the NLL ``[n, D]``; see ``fastmaf.Flow.nll_per_dim``."""
        x = self.x.double()
        terms, found, first = torch.zeros_like(x), [], self.flow.first
        for step in self.flow.before:
            x, terms = step.forward_per_dim(x, terms)
        if isinstance(first, Whitening64):
            x, terms = self.whitened[0], terms + first.terms
        else:
            x, terms = first.forward_per_dim(x, terms)
        for z, shares in self._parts(x, terms):
            for step in self.flow.after:
                z, shares = step.forward_per_dim(z, shares)
            found.append(shares + 0.5 * z.square() + _HALF_LOG_2PI)
        return torch.cat(found)

    def _parts(self, x: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields few rows at a time where transforms follow that a processor's cache is too small for."""
        few = x.device.type == "cpu" and bool(self.flow.after)
        rows = max(1, _CACHED // self.flow.features) if few else max(1, len(x))
        yield from zip(x.split(rows), other.split(rows), strict=True)
