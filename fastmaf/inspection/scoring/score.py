"""From the terms of a likelihood to a score map and one anomaly score per image, and to an anomaly map.

A plain NLL sums 12,288 terms of very different variance, in which a defect of a few pixels is lost. Here each term,
such as the length of a pixel's whitened colours, is standardised by its mean and standard deviation over good images,
clipped and smoothed. The mean of the largest values of this score map is the image's anomaly score.

The anomaly map, which is shown, saved and evaluated pixel by pixel, differs from the score map. To decide whether *any*
part of an image is unusual, each term is standardised by its own spread; but where the edge of an object varies from
image to image, that hides a defect on the edge, and many factors explain away the inside of a large defect. The
residual of a few factors, in a unit common to all pixels, shows both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from fastmaf.images.dataset import image_shape
from fastmaf.inspection.scoring.float64_flow import FlowValues, Whitening64, rounded
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings

Shape: TypeAlias = tuple[int, int]
"""Height and width in pixels."""

LEAST_LEVEL = 1e-6
"""Least mean length of an image's pixels, in noise standard deviations, that others are divided by."""


@dataclass(frozen=True, eq=False)
class TermStatistics:
    """Mean and standard deviation of each of T terms ``[T]``, float32, over good images; mean NLL of unseen ones."""

    mean: Tensor
    deviation: Tensor
    nll: float

    @classmethod
    def of(cls, terms: Tensor, nll: Tensor) -> TermStatistics:
        """Returns the statistics of ``terms`` ``[n, T]`` and ``nll`` ``[n]``, n >= 2."""
        return MergedStatistics.of_terms(terms, nll).finished()

    def on_scale_of(self, held_out: TermStatistics) -> TermStatistics:
        """Returns these statistics of training images on the scale of held-out ones.

        Whitened training images are smaller than new ones, by about the same factor everywhere. All deviations are
        multiplied by the median ratio of the held-out ones to them, and all means are shifted by the median distance
        in units of these. So the clipping of terms applies to both alike, and no term depends on how an image that is
        scored later affected it.
        """
        deviation = self.deviation * (held_out.deviation / self.deviation).median()
        mean = self.mean + deviation * ((held_out.mean - self.mean) / deviation).median()
        return TermStatistics(mean, deviation, held_out.nll)


class MergedStatistics:
    """Counts, means and sums of squared deviations of terms ``[T]``, and the sum of NLLs, of any number of batches.

    References:
        Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance.
    """

    def __init__(self) -> None:
        self.n, self.nll = 0, 0.0
        self.mean = self.squares = torch.zeros(())

    @classmethod
    def of(cls, parts: Sequence[MergedStatistics]) -> MergedStatistics:
        """Returns the statistics of all batches of several others."""
        merged = cls()
        for part in parts:
            merged._merge(part.n, part.mean, part.squares, part.nll)
        return merged

    @classmethod
    def of_terms(cls, terms: Tensor, nll: Tensor) -> MergedStatistics:
        """Returns the statistics of terms ``[n, T]`` and NLLs ``[n]``."""
        merged = cls()
        merged.add(terms, nll)
        return merged

    def add(self, terms: Tensor, nll: Tensor) -> None:
        """Adds a batch of terms ``[n, T]`` and NLLs ``[n]``."""
        if len(terms):
            terms = terms.double()
            mean = terms.mean(dim=0)
            self._merge(len(terms), mean, (terms - mean).square_().sum(dim=0), float(nll.double().sum()))

    def _merge(self, n: int, mean: Tensor, squares: Tensor, nll: float) -> None:
        total = self.n + n
        if not self.n:
            self.mean, self.squares = mean, squares
        elif n:
            change = mean - self.mean
            self.mean = self.mean + change * (n / total)
            self.squares = self.squares + squares + change.square() * (self.n * n / total)
        self.n, self.nll = total, self.nll + nll

    def finished(self) -> TermStatistics:
        """Returns mean and standard deviation of each term, and the mean NLL, of at least 2 images."""
        if self.n < 2:
            raise ValueError(f"a standard deviation needs at least 2 good images; found {self.n}")
        deviation = (self.squares / (self.n - 1)).sqrt()
        # A term that never varied has no scale of its own: the median of the others replaces it.
        typical = deviation[deviation > 0].median() if bool((deviation > 0).any()) else deviation.new_ones(())
        deviation = torch.where(deviation > 1e-3 * typical, deviation, typical)
        return TermStatistics(self.mean.float(), deviation.float(), self.nll / self.n)


def terms_of(values: FlowValues, settings: ScoreSettings, shape: Shape | None = None) -> Tensor:
    """Returns the terms of a score map, float64 ``[n, h w]`` of pixels, else ``[n, D]``.

    Args:
        values: of images.
        settings: which terms.
        shape: of the images, as of ``planes_of``.
    """
    if settings.source == "flow":
        return values.nll_per_dim()
    z = values.whitened[0]
    if settings.presmooth_sigma:
        z = smoothed(planes_of(z, shape), settings.presmooth_sigma).flatten(1)
    if settings.source == "pixels":
        # 20 times as fast as a norm along dimension 1
        lengths = planes_of(z.square(), shape).sum(dim=1).sqrt_().flatten(1)
        level = lengths.mean(dim=1, keepdim=True).clamp_min(LEAST_LEVEL)
        return lengths.div_(level**settings.level_power) if settings.level_power else lengths
    return 0.5 * z.square()


def planes_of(values: Tensor, shape: Shape | None = None) -> Tensor:
    """Returns values ``[n, C h w]``, or terms of pixels ``[n, h w]``, as planes ``[n, C or 1, h, w]``.

    Args:
        values: of images.
        shape: (h, w); None: they are square.
    """
    if shape is None:
        channels, size = image_shape(values.shape[1])
        shape = size, size
    else:
        channels = values.shape[1] // math.prod(shape)
    return values.unflatten(1, (channels, *shape))


def smoothing(size: int, sigma: float) -> Tensor:
    """Returns the matrix ``[size, size]`` that smooths columns by a Gaussian, with repeated edges."""
    return torch.from_numpy(gaussian_filter1d(np.eye(size), sigma, axis=0, mode="nearest"))


def smoothed(planes: Tensor, sigma: float) -> Tensor:
    """Returns planes ``[..., h, w]`` smoothed by a Gaussian of ``sigma`` pixels, with repeated edges."""
    down, across = (smoothing(side, sigma).to(planes) for side in planes.shape[-2:])
    return down @ planes @ across.T


def score_maps(
    terms: Tensor, statistics: TermStatistics, settings: ScoreSettings, shape: Shape | None = None
) -> Tensor:
    """Returns the score maps ``[n, h, w]`` of terms ``[n, T]``; ``shape`` as of ``planes_of``."""
    standard = (terms - statistics.mean) / statistics.deviation
    plain = planes_of(standard.clamp(-settings.clip, settings.clip), shape).sum(dim=1)
    return smoothed(plain, settings.sigma)


def image_scores(maps: Tensor, nll: Tensor, statistics: TermStatistics, settings: ScoreSettings) -> Tensor:
    """Returns one anomaly score per image, float64 ``[n]``, higher is more anomalous; rounded by ``rounded``."""
    if settings.kind == "nll":
        return rounded(nll.double())
    if settings.kind == "typicality":
        return (rounded(nll.double()) - statistics.nll).abs()
    values = maps.flatten(1).double()
    if settings.kind == "map maximum":
        return rounded(values.amax(dim=1))
    return rounded(values.topk(max(1, round(settings.top * values.shape[1])), dim=1).values.mean(dim=1))


@torch.no_grad()
def residuals_of(values: FlowValues, config: AnomalyMapConfig) -> Tensor:
    """Returns the residuals of images after the first factors, float64 ``[n, D]``, not squared."""
    whitening = values.flow.first
    if not isinstance(whitening, Whitening64):
        return values.whitened[0]
    return whitening.unexplained(*values.projected, config.factors) * whitening.scale**config.power


def anomaly_maps(residuals: Tensor, config: AnomalyMapConfig, shape: Shape | None = None) -> Tensor:
    """Returns the anomaly maps ``[n, h, w]`` of residuals ``[n, C h w]``, in units of ``config.rms``.

    A map is the square root of the smoothed squared residuals, summed over the colours. ``shape`` is as of
    ``planes_of``.
    """
    squares = planes_of(residuals.square(), shape).sum(dim=1)
    return smoothed(squares, config.sigma).clamp_min(0).sqrt() / config.rms
