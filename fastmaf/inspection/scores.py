"""From the terms of a likelihood to a map of what is surprising, and from that to one number an image.

A plain NLL adds 12,288 terms of very different spread, in which a defect of a few pixels drowns. Here each term is
standardised by its mean and deviation over normal images that the model has not seen, clipped, added over the colours
and smoothed; the mean of the largest values of that map is the image's anomaly score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

import fastmaf
from fastmaf.inspection.float64 import Evaluated, Float64Flow, rounded

Source: TypeAlias = Literal["whitened", "flow"]
Kind: TypeAlias = Literal["nll", "typicality", "map maximum", "map top"]


@dataclass(frozen=True)
class ScoreSettings:
    """How an image is scored.

    Attributes:
        kind: ``"nll"``, ``"typicality"`` (distance of the NLL from that of normals), ``"map maximum"``, or ``"map
            top"`` (mean of the largest share of the map).
        source: the terms of the map: ``"whitened"``, ½z² after the first transform alone, or ``"flow"``, each
            dimension's share of the whole flow's NLL.
        grain: deviation, in pixels, of the Gaussian that smooths the whitened z of each colour before it is squared:
            the sign of what a defect does holds over neighbours, that of noise does not. 0 for none; ``"flow"`` has no
            sign.
        sigma: deviation of the Gaussian that smooths the map, in pixels.
        clip: largest deviation, either way, that one term may have.
        top: share of the map's pixels that ``"map top"`` takes the mean of.
    """

    kind: Kind = "map top"
    source: Source = "whitened"
    grain: float = 0.0
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
        if not 0 <= self.grain < math.inf:
            raise ValueError(f"grain must be at least 0; found {self.grain}")
        if self.top > 1:
            raise ValueError(f"top is a share of the map's pixels, at most 1; found {self.top}")

    @property
    def needs_nll(self) -> bool:
        """Whether the score is made of the NLL, not of the map."""
        return self.kind in ("nll", "typicality")


@dataclass(frozen=True, eq=False)
class TermStatistics:
    """Mean and deviation of each term ``[D]``, float32, over normals that the model has not seen, and the mean of their
    NLLs.
    """

    mean: Tensor
    deviation: Tensor
    nll: float

    @classmethod
    def of(cls, terms: Tensor, nll: Tensor) -> TermStatistics:
        """Returns those of ``terms`` ``[n, D]`` and ``nll`` ``[n]``, n >= 2."""
        if len(terms) < 2:
            raise ValueError(f"a deviation takes at least 2 normal images; found {len(terms)}")
        mean, deviation = terms.double().mean(dim=0), terms.double().std(dim=0)
        # A term that never varied says nothing about what a deviation is: the usual one of all terms stands for it.
        usual = deviation[deviation > 0].median() if bool((deviation > 0).any()) else deviation.new_ones(())
        deviation = torch.where(deviation > 1e-3 * usual, deviation, usual)
        return cls(mean.float(), deviation.float(), float(nll.double().mean()))


def terms_of(found: Evaluated, settings: ScoreSettings) -> Tensor:
    """Returns the terms of a map, float64 ``[n, D]``."""
    if settings.source == "flow":
        return found.nll_per_dim()
    return 0.5 * smoothed(found.whitened[0], settings.grain).square()


def terms_and_nll(flow: fastmaf.Flow | Float64Flow, x: Tensor, settings: ScoreSettings) -> tuple[Tensor, Tensor]:
    """Returns the terms of a map ``[n, D]``, in the dtype of x, and the NLL ``[n]`` in nats, float64."""
    found = Evaluated(flow, x)
    return terms_of(found, settings).to(x.dtype), found.nll


def smoothed(z: Tensor, sigma: float) -> Tensor:
    """Returns square RGB images ``[n, 3 s²]`` with each colour smoothed by a Gaussian of ``sigma`` pixels, edges
    repeated.
    """
    if sigma == 0:
        return z
    size = math.isqrt(z.shape[1] // 3)
    matrix = smoothing(size, sigma).to(z)
    return (matrix @ z.unflatten(1, (3, size, size)) @ matrix.T).flatten(1)


def smoothing(size: int, sigma: float) -> Tensor:
    """Returns the matrix ``[size, size]`` that smooths columns by a Gaussian, edges repeated: ``S @ map @ S.T``."""
    return torch.from_numpy(gaussian_filter1d(np.eye(size), sigma, axis=0, mode="nearest"))


def maps_of(terms: Tensor, statistics: TermStatistics, settings: ScoreSettings, size: int) -> Tensor:
    """Returns the anomaly maps ``[n, size, size]`` of terms ``[n, 3 size²]``."""
    standard = (terms - statistics.mean) / statistics.deviation
    plain = standard.clamp(-settings.clip, settings.clip).unflatten(1, (3, size, size)).sum(dim=1)
    matrix = smoothing(size, settings.sigma).to(plain)
    return matrix @ plain @ matrix.T


def image_scores(maps: Tensor, nll: Tensor, statistics: TermStatistics, settings: ScoreSettings) -> Tensor:
    """Returns one anomaly score an image, float64 ``[n]``, higher is more anomalous; rounded, see ``rounded``."""
    if settings.kind == "nll":
        return rounded(nll.double())
    if settings.kind == "typicality":
        return (rounded(nll.double()) - statistics.nll).abs()
    values = maps.flatten(1).double()
    if settings.kind == "map maximum":
        return rounded(values.amax(dim=1))
    return rounded(values.topk(max(1, round(settings.top * values.shape[1])), dim=1).values.mean(dim=1))
