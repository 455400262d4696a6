"""From the terms of a likelihood to a score map, and from that to one anomaly score per image.

A plain NLL sums 12,288 terms of very different variance, in which a defect of a few pixels is lost. Here each term is
standardised by its mean and standard deviation over normal images that the model has not seen, clipped, summed over
the colours and smoothed. The mean of the largest values of this score map is the image's anomaly score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from fastmaf.inspection.scoring.float64_flow import FlowValues, rounded

Source: TypeAlias = Literal["whitened", "flow"]
Kind: TypeAlias = Literal["nll", "typicality", "map maximum", "map top"]


@dataclass(frozen=True)
class ScoreSettings:
    """How an image is scored.

    Attributes:
        kind: ``"nll"``, ``"typicality"`` (distance of the NLL from the mean NLL of normal images), ``"map maximum"``,
            or ``"map top"`` (mean of the largest values of the score map).
        source: the terms of the score map: ``"whitened"``, ½z² after the whitening alone, or ``"flow"``, each
            dimension's share of the NLL of the whole flow.
        presmooth_sigma: standard deviation, in pixels, of the Gaussian that smooths the whitened z of each colour
            before it is squared; 0 for none. The sign of a defect's residual is shared by neighbouring pixels, that of
            noise is not. Ignored for ``"flow"``.
        sigma: standard deviation, in pixels, of the Gaussian that smooths the score map.
        clip: largest absolute standardised value of one term.
        top: share of the score map's pixels that ``"map top"`` averages.
    """

    kind: Kind = "map top"
    source: Source = "whitened"
    presmooth_sigma: float = 0.0
    sigma: float = 1.5
    clip: float = 10.0
    top: float = 0.005

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, get_args(Kind)), ("source", self.source, get_args(Source))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; found {value!r}")
        for name in ("sigma", "clip", "top"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive; found {getattr(self, name)}")
        if not 0 <= self.presmooth_sigma < math.inf:
            raise ValueError(f"presmooth_sigma must be at least 0; found {self.presmooth_sigma}")
        if self.top > 1:
            raise ValueError(f"top is a share of the score map's pixels, at most 1; found {self.top}")

    @property
    def needs_nll(self) -> bool:
        """Whether the score is computed from the NLL instead of the score map."""
        return self.kind in ("nll", "typicality")


@dataclass(frozen=True, eq=False)
class TermStatistics:
    """Mean and standard deviation of each term ``[D]``, float32, and the mean NLL, over unseen normal images."""

    mean: Tensor
    deviation: Tensor
    nll: float

    @classmethod
    def of(cls, terms: Tensor, nll: Tensor) -> TermStatistics:
        """Returns the statistics of ``terms`` ``[n, D]`` and ``nll`` ``[n]``, n >= 2."""
        if len(terms) < 2:
            raise ValueError(f"a standard deviation needs at least 2 normal images; found {len(terms)}")
        mean, deviation = terms.double().mean(dim=0), terms.double().std(dim=0)
        # A term that never varied has no scale of its own: the median of the others replaces it.
        typical = deviation[deviation > 0].median() if bool((deviation > 0).any()) else deviation.new_ones(())
        deviation = torch.where(deviation > 1e-3 * typical, deviation, typical)
        return cls(mean.float(), deviation.float(), float(nll.double().mean()))


def terms_of(values: FlowValues, settings: ScoreSettings) -> Tensor:
    """Returns the terms of a score map, float64 ``[n, D]``."""
    if settings.source == "flow":
        return values.nll_per_dim()
    z = values.whitened[0]
    if settings.presmooth_sigma:
        size = math.isqrt(z.shape[1] // 3)
        z = smoothed(z.unflatten(1, (3, size, size)), settings.presmooth_sigma).flatten(1)
    return 0.5 * z.square()


def smoothing(size: int, sigma: float) -> Tensor:
    """Returns the matrix ``[size, size]`` that smooths columns by a Gaussian, with repeated edges."""
    return torch.from_numpy(gaussian_filter1d(np.eye(size), sigma, axis=0, mode="nearest"))


def smoothed(planes: Tensor, sigma: float) -> Tensor:
    """Returns square planes ``[..., s, s]`` smoothed by a Gaussian of ``sigma`` pixels, with repeated edges."""
    matrix = smoothing(planes.shape[-1], sigma).to(planes)
    return matrix @ planes @ matrix.T


def score_maps(terms: Tensor, statistics: TermStatistics, settings: ScoreSettings) -> Tensor:
    """Returns the score maps ``[n, s, s]`` of terms ``[n, 3 s²]``."""
    size = math.isqrt(terms.shape[1] // 3)
    standard = (terms - statistics.mean) / statistics.deviation
    plain = standard.clamp(-settings.clip, settings.clip).unflatten(1, (3, size, size)).sum(dim=1)
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
