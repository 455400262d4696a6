"""Monotonic rational-quadratic splines, element by element."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softmax, softplus


class SplineMap(NamedTuple):
    """A monotonic rational-quadratic spline, and what is made of the network's outputs for it.

    The outputs of a dimension are K widths, K heights, and the derivatives at the knots. Bins are a softmax of the
    first two, within ``[low, high]`` on both sides.

    Attributes:
        bins: K.
        low, high: the interval of the spline.
        tails: outside of the interval z = x; the derivatives at its ends are then 1, and not among the outputs. False:
            there is no outside.
        least: the smallest derivative, and with ``squash`` False the smallest share of a bin.
        squash: as zuko: outputs w are first squashed to w / (1 + abs(w / log least)), of widths and heights with twice
            that slope, and the exponential gives derivatives. False, as nflows: a softplus does.

    References:
        Durkan, Bekasov, Murray and Papamakarios 2019, Neural Spline Flows.

    Example:
        >>> spline = fastmaf.SplineMap(bins=4, low=-3.0, high=3.0)
        >>> raw = torch.zeros(5, spline.outputs)
        >>> z, log_slope = spline.forward(torch.linspace(-4, 4, 5), raw)
        >>> z.shape
        torch.Size([5])
    """

    bins: int = 8
    low: float = -5.0
    high: float = 5.0
    tails: bool = True
    least: float = 1e-3
    squash: bool = True

    def check(self) -> None:
        """Raises ValueError unless the numbers describe a spline."""
        if self.bins < 1:
            raise ValueError(f"a spline needs at least one bin; found {self.bins}")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"the interval of a spline needs low < high; found {self.low}, {self.high}")
        most = 1.0 if self.squash else 1 / self.bins
        if not 0 < self.least < most:
            raise ValueError(f"least must lie between 0 and {most:g} for {self.bins} bins; found {self.least}")

    @property
    def outputs(self) -> int:
        """The number of outputs per dimension: 3 K − 1 with tails, else 3 K + 1."""
        return 3 * self.bins - 1 if self.tails else 3 * self.bins + 1

    def knots(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the places of the knots on both sides and the derivatives there, ``[..., K + 1]``.

        Args:
            raw: ``[..., outputs]``.
        """
        widths, heights, slopes = raw.split([self.bins, self.bins, raw.shape[-1] - 2 * self.bins], -1)
        if self.squash:
            log = math.log(self.least)
            widths, heights = (part / (1 + (2 * part / log).abs()) for part in (widths, heights))
            slopes = (slopes / (1 + (slopes / log).abs())).exp()
        else:
            slopes = self.least + softplus(slopes)
        if self.tails:
            slopes = pad(slopes, (1, 1), value=1.0)
        return self._places(widths), self._places(heights), slopes

    def _places(self, raw: Tensor) -> Tensor:
        shares = softmax(raw, -1)
        if not self.squash:
            shares = self.least + (1 - self.least * self.bins) * shares
        inner = self.low + (self.high - self.low) * shares[..., :-1].cumsum(-1)
        ends = [torch.full_like(raw[..., :1], end) for end in (self.low, self.high)]
        return torch.cat([ends[0], inner, ends[1]], -1)

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``z`` and log dz/dx ``[...]`` for ``x`` ``[...]`` and ``raw`` ``[..., outputs]``.

        Without tails, numbers outside of the interval become NaN.
        """
        xs, ys, slopes = self.knots(raw)
        inner = x.clamp(self.low, self.high)  # outside, derivatives of what is not used might not be finite
        (x0, x1), (y0, y1), (d0, d1) = _bin(xs, inner, xs, ys, slopes)
        s, t = (y1 - y0) / (x1 - x0), (inner - x0) / (x1 - x0)
        z = y0 + (y1 - y0) * (s * t.square() + d0 * t * (1 - t)) / (s + (d0 + d1 - 2 * s) * t * (1 - t))
        return self._within(x, z, _log_slope(s, d0, d1, t))

    def inverse(self, z: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` and log dx/dz ``[...]``; as ``forward``."""
        xs, ys, slopes = self.knots(raw)
        inner = z.clamp(self.low, self.high)
        (x0, x1), (y0, y1), (d0, d1) = _bin(ys, inner, xs, ys, slopes)
        s, rise = (y1 - y0) / (x1 - x0), inner - y0
        bend = d0 + d1 - 2 * s
        a, b, c = (y1 - y0) * (s - d0) + rise * bend, (y1 - y0) * d0 - rise * bend, -s * rise
        # The root within the bin; the form that does not cancel.
        root = (b.square() - 4 * a * c).clamp(min=0).sqrt()
        t = 2 * c / (-b - root)
        return self._within(z, x0 + t * (x1 - x0), -_log_slope(s, d0, d1, t))

    def _within(self, of: Tensor, value: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        inside = (of >= self.low) & (of <= self.high)
        if self.tails:
            outside = torch.where(of.isnan(), of, 0.0)
            return torch.where(inside, value, of), torch.where(inside, log_slope, outside)
        return torch.where(inside, value, math.nan), torch.where(inside, log_slope, math.nan)


def _log_slope(s: Tensor, d0: Tensor, d1: Tensor, t: Tensor) -> Tensor:
    top = d1 * t.square() + 2 * s * t * (1 - t) + d0 * (1 - t).square()
    return 2 * s.log() + top.log() - 2 * (s + (d0 + d1 - 2 * s) * t * (1 - t)).log()


def _bin(places: Tensor, value: Tensor, *knots: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Returns both ends of the bin of a value, of each of the ``knots``; values outside are in the first or last."""
    inner = places[..., 1:-1].detach()
    first = (value[..., None] >= inner).sum(-1, keepdim=True)
    return [tuple(of.gather(-1, first + i).squeeze(-1) for i in (0, 1)) for of in knots]  # type: ignore[misc]
