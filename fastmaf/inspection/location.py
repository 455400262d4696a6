"""Where an image is anomalous: the map that is shown, saved and judged pixel by pixel.

Another one than the map behind the score. Whether *some* place of an image is unusual takes terms that are standardised
each by its own spread; but where the edge of an object varies from image to image, that hides a defect on it, and many
factors explain away the inside of a large one. What is left by a few factors, in a unit common to all pixels, shows
it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.float64 import Evaluated, Float64Flow, Whitening64
from fastmaf.inspection.scores import smoothing


@dataclass(frozen=True)
class Location:
    """How the map of where an image is anomalous is made.

    Attributes:
        factors: so many of the whitening's largest explain the image; what they leave is the map.
        power: residuals are taken in noise deviations times this power of them: 0 in deviations, 1 in the unit of x.
        sigma: deviation in pixels of the Gaussian that smooths the squared residual.
        usual: root mean square over normal images that the model has not seen, the map's unit.
    """

    factors: int = 150
    power: float = 0.5
    sigma: float = 1.0
    usual: float = 1.0

    def __post_init__(self) -> None:
        if self.factors < 0:
            raise ValueError(f"factors must be at least 0; found {self.factors}")
        if not 0 <= self.power <= 1:
            raise ValueError(f"power must lie in [0, 1]; found {self.power}")
        for name in ("sigma", "usual"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive; found {getattr(self, name)}")


def residuals(flow: fastmaf.Flow | Float64Flow, x: Tensor, location: Location) -> Tensor:
    """Returns what the factors leave of images ``[n, D]``, before it is squared, in the dtype of x."""
    return residuals_of(Evaluated(flow, x), location).to(x.dtype)


@torch.no_grad()
def residuals_of(found: Evaluated, location: Location) -> Tensor:
    """Returns ``residuals`` of images that are being evaluated, float64."""
    whitening = found.flow.first
    if not isinstance(whitening, Whitening64):
        return found.whitened[0]
    return whitening.unexplained(*found.projected, location.factors) * whitening.scale**location.power


def location_maps(residual: Tensor, location: Location) -> Tensor:
    """Returns the maps ``[n, s, s]`` of residuals ``[n, 3 s²]``: the root of their smoothed squares, all colours
    together, in units of ``usual``, the root mean square over normal images and their pixels.
    """
    size = math.isqrt(residual.shape[1] // 3)
    squares = residual.square().unflatten(1, (3, size, size)).sum(dim=1)
    matrix = smoothing(size, location.sigma).to(squares)
    return (matrix @ squares @ matrix.T).clamp_min(0).sqrt() / location.usual
